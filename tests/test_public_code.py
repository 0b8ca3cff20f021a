"The comparison with the paper's public code: its glue here, and, where DYNAD_PUBLIC_CODE names its folder, the code itself: the same maps with fewer calls."
import json, os, shutil, sys, time

import numpy as np
import pytest
import torch

from typer.testing import CliRunner

from dynad import public_code as pc
from dynad.cli import app
from dynad.data import load_images, load_masks, split_normal, to_float
from dynad.detector import DynAD
from dynad.public_code import Clock, PublicCodeError, PublicPhi, PublicVAE, TestSet, against, public_code, ratios_table, row_of, run_ours, run_public, settings_of_the_public_code, watched, ways
from dynad.store import StoreError
from dynad.synthetic import write_synthetic

STAND_IN = '''
import time, pickle
import torch
from helper import SHIFT
from consistencydecoder import ConsistencyDecoder

class KNN:
    def __init__(self, config, k=5, num_bins=10): self.k = k
    def fit(self, X): self.X = X
    def transform(self, X): return torch.cdist(torch.as_tensor(X), self.X).topk(self.k, largest=False)

def metric(labels, scores, maps, masks, config):
    with open('readme.txt', 'a') as f: f.write('figures')
    print('figures')
    return 0.

def validate(unet, constants, config):
    train, test = (MVTecDataset(root='', category='', config=config, is_train=t) for t in (True, False))
    vae, fe = AutoencoderKL.from_pretrained('x'), Domain_adaptation(unet, resnet34(pretrained=True)[0], None)
    knn = KNN(config=config, k=config.model.knn_k, num_bins=10)
    look = lambda x: fe((((x + 1)/2) - torch.tensor([.485, .456, .406]).view(1, 3, 1, 1))/torch.tensor([.229, .224, .225]).view(1, 3, 1, 1))
    knn.fit(torch.cat([look(x[None])[1].flatten(1) for x, *_ in train]))
    pickle.dump(knn, open('knn', 'wb'))
    maps, start = [], time.time()
    for x, mask, label, name in torch.utils.data.DataLoader(test, config.data.batch_size):
        knn.transform(look(x)[1].flatten(1))
        z = vae.encode(x).latent_dist.sample()*.18215
        eps = unet(z, torch.full((len(x),), 80))
        y = vae.decode(z/.18215).sample + 0*eps.mean()
        maps.append((x - y).abs().mean(1, keepdim=True) + SHIFT)
    metric([], [], maps, [], config)
    time.time()
    visualize(None, None, None, None, torch.cat(maps), '', config, None, [], [], [], [], [])
'''

@pytest.fixture(scope='module')
def stand_in(tmp_path_factory):
    "A folder with the interface of the public code, which does next to nothing."
    d = tmp_path_factory.mktemp('code')
    (d/'test.py').write_text(STAND_IN)
    (d/'helper.py').write_text('SHIFT = 1.\n')
    return d

@pytest.fixture(scope='module')
def model(smoke): return smoke[0].with_settings(settings_of_the_public_code(smoke[0]))

@pytest.fixture(scope='module')
def data(smoke, boards):
    c = smoke[0].config
    train, _ = split_normal(boards, c.data, c.seed)
    return TestSet(to_float(load_images(train, 64)), to_float(load_images(boards.test, 64)), load_masks(boards.test, 64)[0], torch.tensor([s.label for s in boards.test]))

def test_the_outermost_call_counts_and_all_parts_make_the_whole():
    clock = Clock()
    inner = clock.timed('inner', lambda x: time.sleep(.02))
    outer = clock.timed('outer', lambda x: (inner(x), time.sleep(.02)))
    clock.start(); outer([1, 2]); inner([3]); time.sleep(.02); clock.stop()
    assert clock.seen == {'outer': 2, 'inner': 1} and clock.took['outer'][0] > .035 and clock.took['inner'][0] > .015
    assert clock.total[0] - sum(t[0] for t in clock.took.values()) > .015 and clock.total[1] < .05 # asleep

def test_a_clock_is_taken_off_again(model, data):
    clock, p = Clock(), model.parts
    with pytest.raises(ZeroDivisionError), watched(model, clock): 1/0
    assert not any(k in vars(p.phi) for k in ('forward',)) and 'decode' not in vars(p.autoencoder) and 'severity' not in vars(p.dic)

def test_what_is_no_public_code(tmp_path):
    with pytest.raises(PublicCodeError, match='test.py: no such file'): public_code(tmp_path)
    (tmp_path/'test.py').write_text('import no_such_module')
    with pytest.raises(PublicCodeError, match='no_such_module.*pip install scikit-learn kornia'): public_code(tmp_path)

def test_its_names_are_put_away(stand_in):
    import test as own # of Python itself, which its module is named like
    before = list(sys.path)
    code = public_code(stand_in)
    assert code.SHIFT == 1 and 'helper' not in sys.modules and 'consistencydecoder' not in sys.modules and sys.modules['test'] is own and sys.path == before

def test_the_networks_are_the_same(smoke, data):
    p, x = smoke[0].parts, data.images[:3]
    seen = PublicPhi(p.phi)((x - pc.MEAN)/pc.STD)
    for j, f in p.phi(x).items(): assert torch.allclose(seen[j - 1], f, atol=1e-4)
    vae = PublicVAE(p.autoencoder)
    z = vae.encode(2*x - 1).latent_dist.sample()*pc.SCALE
    assert torch.allclose(z, p.autoencoder.encode(x), atol=1e-5) and torch.allclose(vae.decode(z/pc.SCALE).sample, 2*p.autoencoder.decode(z) - 1, atol=1e-4)

def test_the_loop_is_run_timed_and_leaves_nothing(stand_in, model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = public_code(stand_in)
    r = run_public(code, model, data, batch=4)
    n = len(data.images)
    x_hat = model.parts.autoencoder(data.images)
    assert torch.allclose(r.map, (data.images - x_hat).abs().mean(1, keepdim=True)*2 + 1, atol=1e-3)
    assert r.seen['φ'] == r.seen['UNet'] == r.seen['neighbours'] == n and r.seen['E and D'] == 2*n # the bank is made before it starts its clock
    assert set(r.parts) == {'φ', 'UNet', 'neighbours', 'E and D', 'metrics'} and all((t >= 0).all() for t in r.parts.values()) and r.seconds[0] >= sum(t[0] for t in r.parts.values())
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == '' and code.time is time

def test_ours_is_what_predict_says(model, data):
    run_ours(model, data) # its decision is learned
    r = run_ours(model, data)
    with pytest.warns(UserWarning, match='smallest and largest'): p = model.predict(data.images)
    assert torch.equal(r.map, p.map) and r.seen['φ'] == 2*len(data.images) and r.seen['E and D'] == 2*len(data.images)

@pytest.mark.filterwarnings('ignore')
def test_rows(stand_in, model, data):
    few = {k: m for k, m in ways(model).items() if k in ('exact', '1 step', '1 step, no f_map')}
    c = json.loads(json.dumps(against(public_code(stand_in), model, data, 1, 8, models=few)))
    assert list(c['rows']) == ['public code', 'exact', '1 step', '1 step, no f_map'] and c['rows']['exact']['verdicts that differ'] == 0
    for r in c['rows'].values(): assert r['outside E and D, processor, ms'] < r['all, processor, ms'] and 0 <= r['pro'] <= 100
    assert c['rows']['public code']['all, clock, times'] == 1 and c['rows']['1 step, no f_map']['φ per image'] == 1 and c['rows']['exact']['UNet per image'] == 10*c['rows']['1 step']['UNet per image']

def bench(*words):
    r = CliRunner().invoke(app, ['bench', *map(str, words)])
    return r.exit_code, r.output

def test_on_the_command_line(stand_in, smoke, boards, tmp_path):
    "Tables and JSON say the same; of the run nothing is changed, its store of maps may grow."
    before = {p: p.stat().st_mtime_ns for p in smoke[1].rglob('*') if p.is_file()}
    code, said = bench(smoke[1], '--against', stand_in, '--images', 8, '--repeats', 1, '--json', tmp_path/'a.json', '--data', boards.root)
    assert code == 0, said
    kept = json.loads((tmp_path/'a.json').read_text())
    rows = kept['rows']
    assert kept['images'] == 8 and kept['repeats'] == 1 and kept['run'] == str(smoke[1]) and list(rows)[:2] == ['public code', 'exact']
    assert kept['latent, largest difference'] > 0 and rows['exact']['map, largest difference'] > .5          # the stand-in denoises nothing, and adds 1
    for k in ('outside [ms]', 'by the clock', 'I-AUROC', 'P-AUROC', 'PRO', 'verdicts', 'neighbours', 'UNet'): assert k in said
    for k, r in rows.items(): assert any(line.startswith(k) and f"{r['i_auroc']:.3f}" in line for line in said.splitlines()), k
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())

def test_an_opened_run_has_its_images_again(smoke, boards, tmp_path):
    "Under settings of its own a run measures scales on its held-out images, which an opened one does not hold."
    shutil.copytree(smoke[1], tmp_path/'run')
    opened = DynAD.open(tmp_path/'run', progress=False)
    for stage in ('features', 'latents'): shutil.rmtree(tmp_path/'run'/'stages'/stage)
    way = lambda: ways(opened)['3 steps'].with_settings({'reconstruction.t_max': 130}) # T̂ that no other test has left in the run
    with pytest.raises(StoreError, match='its images are not at hand'): way().predict(torch.rand(1, 3, 64, 64))
    data = pc.test_set(opened, boards, 4)
    assert len(data.images) == 4 and len(opened.training_set.load()) == len(data.train) and len(opened.held_out_set.load()) == len(opened.held_out_set)
    assert way().predict(data.images).map.isfinite().all()

def test_what_the_command_line_refuses(stand_in, smoke, gears, tmp_path):
    for words, why in ((['--against', stand_in], 'name the run'), ([smoke[1], '--against', tmp_path], 'test.py: no such file'), ([smoke[1], '--data', tmp_path], 'only with --against'),
                       ([smoke[1], '--against', stand_in, '--images', 1], 'normal and anomalous ones are needed'), ([smoke[1], '--against', stand_in, '--data', gears], 'not the images that the run was fitted on'),
                       ([smoke[1], '--against', stand_in, '--data', tmp_path/'nowhere'], 'nowhere')):
        code, said = bench(*words)
        assert code == 2 and why in ' '.join(said.split()), (words, said)

@pytest.fixture(scope='module')
def gears(tmp_path_factory): return write_synthetic(tmp_path_factory.mktemp('gears')/'gear', 'gear', n_train=8, n_good=2, n_defect=2, size=64)

def test_latents_are_those_that_are_decoded(model, data):
    run_ours(model, data)
    r = run_ours(model, data)
    with torch.no_grad(): x_hat = model.parts.autoencoder.decode(r.latent)
    with pytest.warns(UserWarning, match='smallest and largest'): p = model.predict(data.images)
    assert r.latent.shape[0] == len(data.images) and torch.allclose(x_hat.clamp(0, 1), p.reconstruction, atol=1e-5)

def test_what_is_kept_says_what_the_text_says():
    "The figures in the notebook: equal maps, equal verdicts in exact mode, and no claim beyond them."
    from dynad.lesson import project_root
    kept = json.loads((project_root()/'nbs'/'results'/'speed'/'public_code.json').read_text(encoding='utf-8'))
    for r in kept.values():
        exact, public = r['rows']['exact'], r['rows']['public code']
        assert exact['map, largest difference'] < 1e-4 and exact['verdicts that differ'] == 0 and public['φ per image'] == 5 and exact['φ per image'] == 2 and exact['UNet per image'] == public['UNet per image'] == 10

def test_a_cell_of_the_ratios_says_speed_verdicts_and_pro():
    way = lambda a, b, pro, v: {'outside E and D, processor, times': a, 'all, processor, times': b, 'pro': pro, 'verdicts that differ': v}
    r = {'images': 54, 'rows': {'public code': way(1., 1., 80.34, 0), 'exact': way(2.137, 2.03, 80.34, 0), '3 steps': way(5.305, 4.389, 84.729, 1)}}
    t = ratios_table({'cookies, seed 1': r}, ['exact', '3 steps'])
    assert t['cookies, seed 1'].tolist() == ['2.1 / 2.0; 0 of 54; +0.0', '5.3 / 4.4; 1 of 54; +4.4'] and list(t.index) == ['exact', '3 steps']

CODE = os.environ.get('DYNAD_PUBLIC_CODE')

@pytest.mark.skipif(not CODE, reason='DYNAD_PUBLIC_CODE names no folder with the public code')
def test_the_public_code_gives_the_same_maps(model, data):
    "Its own loop, sampler, neighbours, maps and scaling, with the same networks: equal to 1e-4, at two calls of φ instead of five."
    run_ours(model, data) # its decision is learned
    theirs, mine = run_public(public_code(CODE), model, data, batch=6), run_ours(model, data)
    assert theirs.map.shape == mine.map.shape and float((theirs.map - mine.map).abs().max()) < 1e-4 and float((theirs.latent - mine.latent).abs().max()) < 1e-4
    assert theirs.seen['φ'] == 5*len(data.images) and mine.seen['φ'] == 2*len(data.images) and theirs.seen['UNet'] == mine.seen['UNet']
