"An exported package is the detector that it was made of, needs no torch, and is refused where it is not; its server keeps its limits."
import io, json, os, subprocess, sys, threading
from base64 import b64decode
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

for name in ('onnx', 'onnxruntime', 'starlette', 'uvicorn'): pytest.importorskip(name, reason=f"{name} is not installed: pip install 'dynad[export,serve]'")

from dynad import export as ex
from dynad.config import make_config
from dynad.detector import DynAD
from dynad.denoiser import set_compiled
from dynad.export import ExportError, check_target, export, exportable, imported, write_runtime
from dynad.patchcore import PatchCore
from dynad.regions import ROI, save_roi
from dynad.runtime import Package, PackageError, needed, predict, predict_arrays, read_images, regions
from dynad.serve import Limits, ServeError, Service, ask, load_test, make_app, serve
from dynad.store import StoreError

BLOCKED = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'torchvision', 'pydantic', 'fastcore', 'scipy', 'pandas', 'matplotlib', 'filelock', 'safetensors'): raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""

@pytest.fixture(scope='module')
def made(smoke, tmp_path_factory):
    "A package, its certificate and the method."
    out = tmp_path_factory.mktemp('package')
    return out, export(smoke[1], out, threads=1, defects=8), DynAD.open(smoke[1], progress=False)

@pytest.fixture(scope='module')
def package(made): return Package(made[0], threads=1)

@pytest.fixture(scope='module')
def files(boards): return [s.image for s in boards.test]

# the package is the method

def test_certificate(made):
    out, c, _ = made
    assert [d['images'] for d in c['compared'].values()] == [5, 8]
    for d in c['compared'].values(): assert d['verdicts that differ'] == 0 and d['T̂ that differ'] == 0 and d['largest difference of map'] < 1e-4
    assert json.loads((out/'certificate.json').read_text(encoding='utf-8')) == json.loads(json.dumps(c))
    page = (out/'certificate.html').read_text(encoding='utf-8')
    assert '0 verdicts differ' in page and page.count('data:image/png') == 4
    assert set(c['files']) == {'phi.onnx', 'encoder.onnx', 'unet.onnx', 'decoder.onnx', 'arrays.npz', 'dynad_runtime.pyz'}

def test_files_of_the_test_set(made, package, files):
    theirs, mine = made[2].predict(files), predict(package, files)
    assert np.abs(theirs.map.numpy() - mine.map).max() < 1e-4
    assert np.array_equal(theirs.anomalous.numpy(), mine.anomalous) and np.array_equal(theirs.t_hat.numpy(), mine.t_hat)
    assert np.abs(theirs.reconstruction.numpy() - mine.reconstruction).max() < 1e-4

SETTINGS = [{'reconstruction.eta': 8., 'reconstruction.clamp_pull': True}, {'reconstruction.severity': 'static', 'reconstruction.static_sampler': 'authors', 'reconstruction.t_max': 80},
            {'reconstruction.average': 3, 'fusion.neighbour': .5, 'fusion.reference': 'decoded', 'fusion.score': 'top', 'fusion.false_alarms': .1},
            {'reconstruction.steps': 'stride', 'reconstruction.indices': 'authors', 'fusion.layers': [1, 3], 'fusion.sigma': 0.}]

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('overrides', SETTINGS, ids=lambda o: next(iter(o)).split('.')[1])
def test_every_setting_of_inference(smoke, made, files, tmp_path, overrides):
    "The same networks under other settings: only what stands between them changes."
    method = smoke[0].with_settings(overrides)
    settings, arrays = ex.settings_of(method)
    for f in made[0].glob('*.onnx'): (tmp_path/f.name).symlink_to(f)
    if set(method.parts.layers) != set(made[2].parts.layers): ex.write_onnx(ex.networks_of(method)['phi'], (tmp_path/'phi.onnx').unlink() or tmp_path/'phi.onnx')
    np.savez(tmp_path/'arrays.npz', **arrays)
    ex.write_manifest(tmp_path, 'onnx', (), settings, {})
    mine, theirs = predict(Package(tmp_path, 1), files[:6]), method.predict(files[:6])
    assert np.abs(theirs.map.numpy() - mine.map).max() < 2e-4
    assert np.abs(theirs.p_value.numpy() - mine.p_value).max() < 1e-9
    assert np.array_equal(theirs.anomalous.numpy(), mine.anomalous) and np.array_equal(theirs.mask.numpy(), mine.mask)

def test_alone_as_in_a_batch(package, files):
    x = read_images(files[:9], package.settings['image_size'])
    assert np.abs(predict_arrays(package, x).map[4] - predict_arrays(package, x[4:5]).map[0]).max() < 1e-5

def test_patchcore(boards, tmp_path):
    method = PatchCore(make_config('smoke')).fit(boards, tmp_path/'run', progress=False)
    c = export(tmp_path/'run', tmp_path/'out', threads=1, defects=4)
    assert sum(d['verdicts that differ'] for d in c['compared'].values()) == 0 and not (tmp_path/'out'/'unet.onnx').exists()
    file = boards.test[0].image
    assert abs(float(method.predict([file]).score) - predict(Package(tmp_path/'out', 1), [file]).score[0]) < 1e-3

def test_a_method_that_is_compiled(smoke, tmp_path):
    "Its graph cannot be written as ONNX; the weights are those of the network without torch.compile, which stays as it is."
    import copy
    method = DynAD.open(smoke[1], {'denoiser.compile': True}, progress=False)
    set_compiled(method.parts.denoiser, backend='aot_eager') # inductor needs a C++ compiler
    assert all_agree(export(copy.copy(method), tmp_path/'out', threads=1, defects=2))
    assert method.config.denoiser.compile and method.parts.denoiser.unet._compiled_call_impl is not None

@pytest.fixture(scope='module')
def openvino():
    pytest.importorskip('openvino', reason="openvino is not installed: pip install 'dynad[export]'")

def test_openvino(openvino, smoke, files, tmp_path):
    "The other runtime, here and in the zip alone."
    c = export(smoke[1], tmp_path/'out', 'openvino', threads=1, defects=2)
    assert all_agree(c) and c['runtime'] == 'openvino' and set(c['files']) >= {'phi.xml', 'phi.bin', 'unet.xml', 'unet.bin'} and 'openvino' in c['versions']
    same_answers(smoke[0], tmp_path/'out', files[:6], tmp_path)

def test_openvino_in_int8(openvino, eight, tmp_path):
    "The quantised networks, as the other runtime reads them."
    from dynad.runtime import OnnxNetwork, OpenVinoNetwork
    shapes = Package(eight[0], 1).manifest['networks']
    for name in eight[1]['int8']:
        ex.write_network(eight[0]/f'{name}.onnx', name, tmp_path, 'openvino')
        given = [np.random.default_rng(0).random([3, *s[1:]], np.float32) if len(s) > 1 else np.array([0, 300, 700]) for s in shapes[name]['inputs'].values()]
        (a,), (b,) = (net(*given) for net in (OnnxNetwork(eight[0]/f'{name}.onnx', 1), OpenVinoNetwork(tmp_path/f'{name}.xml', 1)))
        assert a.shape == b.shape and np.abs(a - b).mean() < .05*np.abs(a).mean()

# without torch

def test_runtime_without_torch_or_this_package(made, package, files, tmp_path):
    "The zip alone, in a process that could not import torch, pydantic or anything of ours if it wanted to."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    words = [sys.executable, '-c', BLOCKED, str(made[0]/'dynad_runtime.pyz'), 'predict', str(files[0].parent)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    same = [f for f in files if f.parent == files[0].parent]
    assert [Path(r['image']) for r in rows] == sorted(same)
    assert np.allclose([r['score'] for r in rows], predict(package, sorted(same)).score, atol=1e-5)

def test_runtime_goes_on_behind_an_image_that_cannot_be_read(made, files, tmp_path):
    "A line for each, and exit status 1 in the end; mistakes of the command are one line."
    import shutil
    (tmp_path/'images').mkdir()
    for k, f in enumerate(files[:3]): shutil.copy(f, tmp_path/'images'/f'{k}.png')
    (tmp_path/'images'/'1.png').write_bytes(files[1].read_bytes()[:300])
    (tmp_path/'images'/'notes.txt').write_text('x')
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    call = lambda *words: subprocess.run([sys.executable, '-c', BLOCKED, str(made[0]/'dynad_runtime.pyz'), *words], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120)
    done = call('predict', 'images')
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and 'error: 1 image could not be read' in done.stderr and 'not used: ' in done.stderr and 'Traceback' not in done.stderr
    assert [Path(r['image']).name for r in rows] == ['0.png', '1.png', '2.png'] and 'score' in rows[0] and 'score' in rows[2] and '1.png' in rows[1]['error']
    for words, says in ((['--port', '99999'], 'port = 99999: allowed: 1…65535'), (['--max-bytes', '0'], 'bytes = 0: must be above 0'), (['--waiting', '-1'], 'waiting = -1'), (['--max-pixels', '0'], 'pixels = 0'), (['--seconds', '0'], 'seconds = 0')):
        done = call('serve', *words)
        assert done.returncode == 1 and done.stderr.strip().splitlines() == [f'error: {done.stderr.strip()[7:]}'] and says in done.stderr, done.stderr

def test_runtime_imports_nothing_heavy():
    assert imported('serve') >= {'runtime', 'images', 'metadata'} and not imported('serve') & {'store', 'exports', 'method', 'config'}

def test_runtime_is_reproducible(tmp_path):
    for name in 'ab': write_runtime(tmp_path/name)
    assert (tmp_path/'a').read_bytes() == (tmp_path/'b').read_bytes()

# refused

def test_changed_file_is_named(made, tmp_path):
    import shutil
    shutil.copytree(made[0], tmp_path/'p')
    (tmp_path/'p'/'unet.onnx').write_bytes(b'cut off')
    with pytest.raises(PackageError, match='unet.onnx: was changed'): Package(tmp_path/'p')

def changed(made, to, change):
    "A package with another manifest.json, and the same files."
    to.mkdir()
    for f in made.iterdir(): (to/f.name).symlink_to(f)
    m = json.loads((made/'manifest.json').read_text())
    (to/'manifest.json').unlink()
    (to/'manifest.json').write_text(json.dumps(change(m)))
    return to

def moved(m): m['settings']['decision']['image_threshold'], m['settings']['fusion']['lam'] = 99, 0; return m
def fewer(m): del m['files']['unet.onnx']; return m
def other(m): m['runtime'] = 'openvino'; return m

@pytest.mark.parametrize('change, says', [(moved, r'manifest.json: was changed \(settings or list of files\); export it again'), (fewer, 'manifest.json: was changed'), (other, 'manifest.json: was changed'),
    (lambda m: {'format': m['format'], 'files': {}}, 'lacks dynad, runtime, int8, networks, settings, sha256; export it again'), (lambda m: m | {'settings': []}, 'lacks settings'), (lambda m: [], "format 'list'"),
    (lambda m: {k: v for k, v in m.items() if k != 'sha256'}, 'lacks sha256'), (lambda m: m | {'format': 2}, 'format 2, and this dynad reads format 3; export it again .* its own dynad_runtime.pyz')])
def test_a_changed_manifest_is_refused(made, tmp_path, change, says):
    with pytest.raises(PackageError, match=says): Package(changed(made[0], tmp_path/'p', change))

def test_a_manifest_that_only_looks_different_is_taken(made, tmp_path):
    "Its order and its spaces say nothing; the certificate names the hash."
    p = Package(changed(made[0], tmp_path/'p', lambda m: dict(reversed(m.items()))), 1)
    assert p.manifest['sha256'] == made[1]['manifest'] and made[1]['manifest'] in (made[0]/'certificate.html').read_text(encoding='utf-8')
    with pytest.raises(PackageError, match='threads = -1: must be above 0'): Package(made[0], -1)

@pytest.mark.parametrize('settings, says', [({'reconstruction.omega': .5}, 'reconstruction.omega = 0.5')])
def test_what_cannot_be_exported(made, settings, says):
    with pytest.raises(ExportError, match=says): exportable(made[2].with_settings(settings))

def test_a_differing_verdict_is_refused_and_nothing_is_exchanged(made, smoke, monkeypatch, tmp_path):
    "A package whose networks are not those of the method."
    out = tmp_path/'out'
    real = ex.write_onnx
    def wrong(n, file):
        if file.stem == 'decoder': n = ex.Network(ex.Piece(n.module, lambda m, z: (1 - m(z)[0],)), n.example, n.inputs, n.outputs)
        real(n, file)
    monkeypatch.setattr(ex, 'write_onnx', wrong)
    with pytest.raises(ExportError, match='verdicts differ.*nothing was written'): export(smoke[1], out, threads=1, defects=4)
    assert not out.exists()

def needed_is_there(to):
    try: return bool(needed({'onnx': 'onnxruntime'}.get(to, to)))
    except PackageError: return False

def test_refused_before_the_work(smoke, boards, tmp_path, monkeypatch):
    "Neither is the run opened for what the command says, nor anything computed for what its settings say."
    (tmp_path/'pc').mkdir(); (tmp_path/'ganomaly').mkdir()
    from dynad.config import dump_config
    (tmp_path/'pc'/'config.json').write_text(dump_config(make_config('smoke', {'method': 'patchcore'}))) # nothing else of a run
    (tmp_path/'ganomaly'/'config.json').write_text(dump_config(make_config('smoke', {'method': 'skip_ganomaly'})))
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'encoder.onnx').write_text('of somebody')
    with pytest.raises(ExportError, match='patchcore: int8 is of the UNet'): export(tmp_path/'pc', tmp_path/'x', int8=True)
    with pytest.raises(ExportError, match="skip_ganomaly: can't be exported"): export(tmp_path/'ganomaly', tmp_path/'x')
    monkeypatch.setattr(ex, 'proof_of', None)
    with pytest.raises(ExportError, match='calls neither for its map'): export(smoke[0].with_settings({'fusion.neighbour': 1.}), tmp_path/'x', int8=True)
    monkeypatch.setattr(ex, 'open_for_prediction', None)
    with pytest.raises(StoreError, match='encoder.onnx: is there already'): export(smoke[1], tmp_path/'out')
    assert not (tmp_path/'x').exists() and [p.name for p in (tmp_path/'out').iterdir()] == ['encoder.onnx']

def test_targets(tmp_path):
    with pytest.raises(ExportError, match='did you mean onnx'): check_target('onyx', False, tmp_path)
    (tmp_path/'manifest.json').write_text('{}')
    with pytest.raises(StoreError, match='was not written by dynad'): check_target('onnx', False, tmp_path)
    for n, (to, name, method) in enumerate([('onnx', 'phi.onnx', 'patchcore'), ('onnx', 'unet.onnx', 'dynad'), ('openvino', 'decoder.bin', 'dynad'), ('onnx', 'dynad_runtime.pyz', 'dynad')]):
        (tmp_path/str(n)).mkdir()
        (tmp_path/str(n)/name).write_text('of somebody')
        if needed_is_there(to):
            with pytest.raises(StoreError, match=f'{name}: is there already and was not written by dynad'): check_target(to, False, tmp_path/str(n), method)
    with pytest.raises(ExportError, match='patchcore: int8 is of the UNet and the decoder'): check_target('onnx', True, tmp_path/'x', 'patchcore')
    with pytest.raises(PackageError, match="no_such.*pip install"): needed('no_such')

@pytest.fixture(scope='module')
def eight(smoke, tmp_path_factory):
    "A package in int8, whatever it costs."
    out = tmp_path_factory.mktemp('int8')
    return out, export(smoke[1], out, int8=True, most=100., threads=1, defects=6)

def test_int8_measures_scales_and_threshold_anew(made, eight):
    out, c = eight
    assert c['int8'] == ['unet', 'decoder'] and len(c['tried']) == 1 and set(c['points']['lost']) == {'i_auroc', 'p_auroc', 'pro'}
    a, b = Package(out, 1).settings, Package(made[0], 1).settings
    assert a['calibration'] != b['calibration'] and a['decision'] != b['decision']
    assert (out/'unet.onnx').stat().st_size < .7*(made[0]/'unet.onnx').stat().st_size

def test_int8_that_costs_too_much_is_refused(eight, smoke, monkeypatch, tmp_path):
    monkeypatch.setattr(ex, 'QUANTISED', (('unet',),))
    real = ex.points
    def worse(*a): return {k: v - 1. for k, v in real(*a).items()} if sys._getframe(1).f_code.co_name == 'certificate' else real(*a)
    monkeypatch.setattr(ex, 'points', worse)
    with pytest.raises(ExportError, match=r'int8 costs more than 0.5 points.*unet: i_auroc.*nothing was written'): export(smoke[1], tmp_path/'out', int8=True, threads=1, defects=4)
    assert not (tmp_path/'out').exists()

# the server

@contextmanager
def running(package, limits):
    "A running server; its address and its service."
    import socket, time, uvicorn
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    service = Service(package, limits)
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=port, log_level='error'))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.time() + 20
    while not server.started and time.time() < end: time.sleep(.01)
    yield f'http://127.0.0.1:{port}', service
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()

@pytest.fixture(scope='module')
def server(package):
    "A running server with tight limits."
    with running(package, Limits(bytes=400_000, pixels=300_000, waiting=6, seconds=1.)) as s: yield s

def picture(side, **kw):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)).save(out, **{'format': 'PNG', **kw})
    return out.getvalue()

def test_posted_image_is_judged_as_the_file(server, package, files):
    got, mine = ask(server[0], files[-1].read_bytes(), 'overlay', 'map'), predict(package, [files[-1]])
    assert got['score'] == pytest.approx(float(mine.score[0]), abs=1e-5) and (got['verdict'] == 'anomalous') == bool(mine.anomalous[0])
    assert np.abs(np.load(io.BytesIO(b64decode(got['map']))) - mine.map[0, 0]).max() < 1e-5
    assert Image.open(io.BytesIO(b64decode(got['overlay']))).size == (64, 64)
    assert sum(r['area'] for r in got['regions']) == pytest.approx(got['anomalous_pixels']/64**2)
    with Image.open(files[-1]) as im: assert all(0 <= r['box'][0] < r['box'][2] <= im.width for r in got['regions'])

@pytest.mark.parametrize('data, status, says', [(b'', 422, 'empty'), (b'no image', 422, 'not an image'), (b'../../etc/passwd', 422, 'not an image'), (picture(600, format='JPEG', quality=20), 413, '600×600 pixels'),
                                                (b'\0'*500_000, 413, '400000'), (picture(100)[:900], 422, 'damaged')], ids=['empty', 'text', 'path', 'pixels', 'bytes', 'cut off'])
def test_limits(server, data, status, says):
    got = ask(server[0], data)
    assert got['status'] == status and says in got['error'] and '/' not in got['error'].replace('image/', '')

def raw(url, text, wait=3):
    import socket
    host, port = url.removeprefix('http://').split(':')
    with socket.create_connection((host, int(port)), timeout=10) as s:
        s.sendall(text)
        s.settimeout(10)
        return s.recv(65536).decode()

def test_slow_and_endless_bodies(server):
    assert raw(server[0], b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc').startswith('HTTP/1.1 408')
    part = b'10000\r\n' + b'x'*0x10000 + b'\r\n'
    assert raw(server[0], b'POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n' + part*8).startswith('HTTP/1.1 413')

@pytest.fixture(scope='module')
def usual(package):
    "A running server with the limits of the default."
    with running(package, Limits()) as s: yield s

@pytest.mark.parametrize('n', [25_000_000, 50_000_000, 120_000_000])
def test_a_body_that_is_too_large_is_told_so(usual, n):
    "Also beyond what is taken and dropped, where the connection may be closed on a client that sends."
    assert ask(usual[0], bytes(n)) == {'error': f'{n} bytes; this server takes 20000000', 'status': 413}

def test_an_ordinary_client_that_sends_all_before_it_reads(usual):
    from http.client import HTTPConnection
    for path, status in (('/predict', 413), ('/elsewhere', 404), ('/health', 405)):
        c = HTTPConnection(usual[0].removeprefix('http://'), timeout=30)
        c.request('POST', path, bytes(30_000_000), {'Connection': 'close'})
        assert c.getresponse().status == status
        c.close()

def test_who_is_sent_away_with_a_large_image_reads_it(package):
    "More bytes than the buffers of a connection hold."
    with running(package, Limits(waiting=1)) as (url, service):
        service.counts.waiting = 1
        got = [ask(url, bytes(7_700_000)) for _ in range(3)]
        service.counts.waiting = 0
    assert got == [{'error': '1 requests are waiting; try again', 'status': 503}]*3

def test_a_client_that_asks_before_it_sends(usual):
    assert raw(usual[0], b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000000\r\nExpect: 100-continue\r\n\r\n').startswith('HTTP/1.1 413')

def test_a_client_that_goes_and_an_error_are_counted(usual, files, monkeypatch, caplog):
    "No traceback for who has gone; one for what nobody expected, and an answer."
    import socket, time
    from dynad import serve
    url, service = usual
    with socket.create_connection(('127.0.0.1', int(url.rsplit(':')[-1]))) as s: s.sendall(b'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc')
    end = time.time() + 10
    while not service.counts.status[499] and time.time() < end: time.sleep(.02)
    assert service.counts.status[499] == 1 and service.counts.waiting == 0 and not caplog.records
    monkeypatch.setattr(serve, 'reply', lambda *a: {}['no such part'])
    got = ask(url, files[0].read_bytes())
    assert got == {'error': "KeyError: 'no such part'", 'status': 500} and service.counts.status[500] == 1
    assert [r.name for r in caplog.records] == ['dynad.serve'] and 'no such part' in caplog.text

def test_other_names_and_routes(server):
    assert raw(server[0], b'GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n').startswith('HTTP/1.1 400')
    assert raw(server[0], b'GET /predict HTTP/1.1\r\nHost: localhost\r\n\r\n').startswith('HTTP/1.1 405')
    assert raw(server[0], b'GET /../manifest.json HTTP/1.1\r\nHost: localhost\r\n\r\n').startswith('HTTP/1.1 404')

def test_an_error_ends_one_request_and_not_the_worker(server, package, files, monkeypatch):
    from dynad import serve
    monkeypatch.setattr(serve, 'predict_opened', lambda *a: 1/0)
    got = ask(server[0], files[0].read_bytes())
    monkeypatch.undo()
    assert got['status'] == 500 and 'ZeroDivisionError' in got['error'] and 'score' in ask(server[0], files[0].read_bytes())

def test_load(server, files):
    "More clients than may wait: some are sent away and come again, none is lost, and every one is counted."
    url, service = server
    before = sum(service.counts.verdicts.values())
    got = load_test(url, [f.read_bytes() for f in files], requests=100, clients=12)
    assert got['lost'] == 0 and got['sent away'] > 0 and sum(service.counts.verdicts.values()) - before == 100 and service.counts.waiting == 0
    text = service.counts.text()
    assert f'dynad_requests_total{{status="503"}} {got["sent away"]}' in text and 'dynad_waiting 0' in text

def test_load_counts_what_is_lost(server, files):
    "Whatever a server says: uvicorn's own refusal is no JSON, and another program may answer anything."
    import http.server, socket, uvicorn
    said = iter([b'Service Unavailable', b'[]', b'<html>', b'{"score": 1}'] + [b'no json']*99)
    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = next(said)
            self.rfile.read(int(self.headers['Content-Length']))
            self.send_response(503 if body[:1] == b'S' else 200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *a): pass
    with http.server.HTTPServer(('127.0.0.1', 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        got = load_test(f'http://127.0.0.1:{other.server_port}', [b'x'], requests=4, clients=2)
        other.shutdown()
    assert (got['requests'], got['lost'], got['sent away']) == (4, 3, 1)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    assert load_test(f'http://127.0.0.1:{port}', [b'x'], requests=3, clients=2)['lost'] == 3 # nobody is there

def test_uvicorns_own_refusal(package, files):
    "Connections that are kept open count; who comes then is told in plain text to come again."
    import socket, time, uvicorn
    server = uvicorn.Server(uvicorn.Config(make_app(Service(package)), log_level='critical', limit_concurrency=2))
    with socket.create_server(('127.0.0.1', 0)) as at:
        url = f'http://127.0.0.1:{at.getsockname()[1]}'
        thread = threading.Thread(target=server.run, args=([at],), daemon=True)
        thread.start()
        while not server.started: time.sleep(.01)
        with socket.create_connection(at.getsockname()), socket.create_connection(at.getsockname()):
            time.sleep(.2)
            assert ask(url, b'x') == {'error': 'Service Unavailable', 'status': 503}
        got = load_test(url, [files[0].read_bytes()], requests=4, clients=3)
        server.should_exit = True
        thread.join(20)
    assert got['lost'] == 0 and got['sent away'] > 0

def test_ports(made):
    import socket
    with pytest.raises(ServeError, match='port = 99999: allowed: 1…65535'): serve(made[0], port=99999)
    with socket.create_server(('127.0.0.1', 0)) as s:
        with pytest.raises(ServeError, match='in use.*choose another port'): serve(made[0], port=s.getsockname()[1])
    with pytest.raises(ServeError, match='no.such.host.invalid, port 8000: cannot be listened on'): serve(made[0], 'no.such.host.invalid')

def test_limits_are_checked():
    with pytest.raises(ServeError, match='pixels = 0'): Limits(pixels=0)

def test_regions_are_those_of_scipy():
    from scipy.ndimage import label
    for seed in range(30):
        m = np.random.default_rng(seed).random((1, 17, 23)) > .55
        found = regions(m, m*1., most=999)
        assert len(found) == label(m[0], np.ones((3, 3)))[1] and sum(r['area'] for r in found) == pytest.approx(m.mean())
    assert regions(np.zeros((1, 4, 4), bool), np.zeros((1, 4, 4))) == []

# a region of interest, and tiles

@pytest.fixture(scope='module')
def left(tmp_path_factory):
    "The left 45 % count."
    return str(save_roi(ROI(np.arange(100)[None].repeat(60, 0) < 45), tmp_path_factory.mktemp('roi')/'roi.png'))

def alone(package, images, cwd):
    "The zip's answers, in a process that cannot import torch."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, '-c', BLOCKED, str(package/'dynad_runtime.pyz'), 'predict', *map(str, images)], capture_output=True, text=True, cwd=cwd, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return {Path(r['image']): r for r in map(json.loads, done.stdout.splitlines())}

def same_answers(method, out, files, cwd):
    "Torch, the package and the zip alone say the same of these files."
    theirs, mine, rows = method.predict(files), predict(Package(out, 1), files), alone(out, files, cwd)
    assert theirs.map.shape == mine.map.shape and np.abs(theirs.map.numpy() - mine.map).max() < 2e-4*max(1, float(theirs.map.abs().max()))
    assert np.array_equal(theirs.anomalous.numpy(), mine.anomalous) and np.array_equal(theirs.mask.numpy(), mine.mask)
    assert np.abs(theirs.p_value.numpy() - mine.p_value).max() < 1e-9
    assert [rows[f]['anomalous'] for f in files] == theirs.anomalous.tolist() and np.allclose([rows[f]['score'] for f in files], mine.score, atol=1e-5)
    return mine

def all_agree(c): return sum(d['verdicts that differ'] for d in c['compared'].values()) == 0

@pytest.fixture(scope='module')
def inside(smoke, left, tmp_path_factory):
    "A package of a run with a region of interest, in int8 whatever it costs; the method; the float certificate before."
    root, method = tmp_path_factory.mktemp('roi'), smoke[0].with_settings({'data.roi': left})
    return root, export(method, root/'float', threads=1, defects=8), export(method, root/'int8', int8=True, most=100., threads=1, defects=8), method

def test_region_of_interest(inside, smoke, files, tmp_path):
    root, c, _, method = inside
    assert c['roi'] == pytest.approx(.45) and all_agree(c) and 'region of interest' in ex.verdict_line(c)
    mine = same_answers(method, root/'float', files, tmp_path)
    assert not mine.mask[..., 29:].any() and not np.allclose(mine.score, smoke[0].predict(files).score) # the region decides
    assert Package(root/'float', 1).settings['decision']['image_threshold'] != smoke[0].decision.image_threshold

def test_region_of_interest_in_int8(inside, smoke):
    "Scales are measured inside, as torch does."
    root, _, _, method = inside
    levels = Package(root/'int8', 1).settings['calibration']['levels']
    T = torch.tensor([int(k) for k in levels])
    far = lambda m: sum(np.abs(np.array(levels[str(k)]) - v).sum() for k, v in m.calibrated(T).levels.items())
    assert far(method) < far(smoke[0])

def test_certificate_of_a_region_without_a_defect(smoke, tmp_path):
    "A corner of two pixels: verdicts are compared, what int8 costs cannot be measured."
    corner = save_roi(ROI((np.indices((64, 64)) < 2).all(0)), tmp_path/'roi.png')
    method = smoke[0].with_settings({'data.roi': str(corner)})
    c = export(method, tmp_path/'out', threads=1, defects=2)
    assert all_agree(c) and c['points']['torch'] == {}
    with pytest.raises(ExportError, match='no synthetic defect lies in the region of interest.*without --int8'): export(method, tmp_path/'out', int8=True, threads=1, defects=2)

TILES = {'data.tile': 64, 'data.stride': 48}
FEW = {'denoiser.steps': 5, 'latents.finetune_steps': 1, 'adaptation.gamma': 0, 'denoiser.checkpoint_every': 10, 'data.max_tiles': 24, 'data.max_calibration': 6}

@pytest.fixture(scope='module')
def tiled(boards, tmp_path_factory):
    "A run of the paper's method on tiles, and its package."
    root = tmp_path_factory.mktemp('tiled')
    with pytest.warns(UserWarning, match='drawn at random'): method = DynAD(make_config('smoke', {**FEW, **TILES})).fit(boards, root/'run', progress=False)
    with pytest.warns(UserWarning, match='drawn at random'): return root/'out', export(root/'run', root/'out', threads=1, defects=4), method

def strip(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 300, 3), np.uint8)).save(path)
    return path

def test_tiles(tiled, files, tmp_path):
    out, c, method = tiled
    assert all_agree(c) and c['tiles']['tile'] == 64 and [d['images'] for d in c['compared'].values()] == [5, 4] and 'tiles of 64 pixels every 48' in ex.verdict_line(c)
    mine = same_answers(method, out, [*files[:3], strip(tmp_path/'strip.png')], tmp_path)
    assert mine.map.shape[-2:] == (128, 128)
    x = np.stack([np.asarray(Image.open(files[0]).convert('RGB'))]).transpose(0, 3, 1, 2)/np.float32(255)
    assert np.abs(predict_arrays(Package(out, 1), x).map - mine.map[:1]).max() < 1e-5

@pytest.mark.filterwarnings('ignore:.*drawn at random')
def test_tiles_in_int8(tiled, tmp_path):
    c = export(tiled[2], tmp_path/'out', int8=True, most=100., threads=1, defects=2)
    assert c['int8'] == ['unet', 'decoder'] and Package(tmp_path/'out', 1).cuts.tile == 64

def test_tiles_with_context_in_a_region(boards, files, left, tmp_path):
    PatchCore(make_config('smoke', {**TILES, 'data.context': .4, 'data.roi': left})).fit(boards, tmp_path/'run', progress=False)
    c = export(tmp_path/'run', tmp_path/'out', threads=1, defects=4)
    assert all_agree(c) and c['roi'] and c['tiles']['context'] == .4
    mine = same_answers(PatchCore.open(tmp_path/'run', progress=False), tmp_path/'out', files[:4], tmp_path)
    assert not mine.mask[..., 60:].any()

def test_served_on_tiles(tiled, files, tmp_path):
    package = Package(tiled[0], 1)
    with running(package, Limits(pixels=300_000)) as (url, _):
        for f in (files[-1], strip(tmp_path/'strip.png')):
            got, mine = ask(url, f.read_bytes(), 'overlay', 'map'), predict(package, [f])
            assert got['score'] == pytest.approx(float(mine.score[0]), abs=1e-5) and (got['verdict'] == 'anomalous') == bool(mine.anomalous[0])
            assert np.load(io.BytesIO(b64decode(got['map']))).shape == (128, 128) and Image.open(io.BytesIO(b64decode(got['overlay']))).size == (128, 128)
            with Image.open(f) as im: assert all(0 <= r['box'][0] < r['box'][2] <= im.width and r['box'][3] <= im.height for r in got['regions'])
        assert load_test(url, [f.read_bytes() for f in files[:4]], requests=12, clients=3)['lost'] == 0

def chosen(method, at):
    "The method with a threshold that a person chose."
    import copy
    from dynad.threshold import Chosen
    out = copy.copy(method)
    out.choice = Chosen(at=at, scale=method.learned_decision.normal_scores, why='the customer')
    assert out.decision.image_threshold == at
    return out

def between(scores): return float(np.sort(scores)[1:3].mean())

def test_a_threshold_that_a_person_chose(smoke, tmp_path):
    "The package decides as the run does."
    method = chosen(smoke[0], between(smoke[0].learned_decision.normal_scores))
    c = export(method, tmp_path/'out', threads=1, defects=4)
    assert all_agree(c) and Package(tmp_path/'out', 1).settings['decision']['image_threshold'] == method.choice.at
    assert not c['threshold']['carried over'] and 'threshold chosen by hand' in ex.verdict_line(c)

def test_a_threshold_that_a_person_chose_in_8_bits(smoke, tmp_path):
    "It is carried over to the same place among the held-out normal scores, and the certificate says so."
    method = chosen(smoke[0], between(smoke[0].learned_decision.normal_scores))
    c = export(method, tmp_path/'out', int8=True, most=100., threads=1, defects=2)
    d, before = Package(tmp_path/'out', 1).settings['decision'], method.decision
    assert d['chosen']['at'] == before.image_threshold != d['image_threshold'] == c['threshold']['of the package'] and d['false_alarms'] is None
    rank = lambda scores, at: int((np.asarray(scores) > at).sum())
    assert rank(d['normal_scores'], d['image_threshold']) == rank(before.normal_scores, before.image_threshold) == c['threshold']['above it in the package']
    assert 'the chosen threshold carried over' in ex.verdict_line(c) and f"{d['image_threshold']:.4g} in the package" in ex.verdict_line(c)
    assert 'because: the customer' in (tmp_path/'out'/'certificate.html').read_text(encoding='utf-8')

def test_a_threshold_that_a_person_chose_in_half_precision(smoke):
    "A package computes in float32, where the scores are others."
    c = smoke[0].config
    half = smoke[0].with_parts(config=c.model_copy(update={'precision': 'bf16'}))
    scores = half.learned_decision.normal_scores
    method = chosen(half, float(np.sort(scores)[-1] + np.ptp(scores)))
    plain = exportable(method)
    assert plain.config.precision == 'no' and plain.learned_decision.normal_scores == smoke[0].learned_decision.normal_scores != scores
    d = plain.decision
    assert d.chosen and d.image_threshold > max(d.normal_scores) and f'carried over from {method.choice.at:.4g} to float32' in d.in_words(1.)
    assert method.decision.image_threshold == method.choice.at

@pytest.mark.parametrize('at, to', [(.2, .3), (.3, .45), (.5, .9), (1., 1.9), (1.8, 3.5), (.1, .1)])
def test_a_threshold_on_another_scale(at, to):
    from dynad.export_networks import carried
    assert carried(at, [1., .2, .5, .4], [.3, .6, 1.9, .9]) == pytest.approx(to) and carried(at, [.5], [.7]) == pytest.approx(at + .2)

def test_a_later_format_is_refused(made, tmp_path):
    "A package that this version would misread."
    m = json.loads((made[0]/'manifest.json').read_text())
    assert m['format'] == 3
    (tmp_path/'manifest.json').write_text(json.dumps(m | {'format': 4}))
    with pytest.raises(PackageError, match='format 4, and this dynad reads format 3'): Package(tmp_path)

def test_whole_images_wait_as_they_were_sent(tiled, files, monkeypatch):
    "Of many that wait at once, few are decoded at a time; a bad one among them is refused alone."
    import gc, weakref
    from concurrent.futures import ThreadPoolExecutor
    from dynad import serve
    real, alive, most = serve.opened, set(), []
    def watched(*a):
        im = real(*a)
        alive.add(id(im)); weakref.finalize(im, alive.discard, id(im))
        most.append(len(alive))
        return im
    monkeypatch.setattr(serve, 'opened', watched)
    images = [f.read_bytes() for f in files[:5]]*2 + [b'no image', files[0].read_bytes()[:900]]
    with running(Package(tiled[0], 1), Limits(waiting=16)) as (url, service), ThreadPoolExecutor(12) as clients:
        got = list(clients.map(lambda b: ask(url, b, 'overlay'), images))
        gc.collect()
        assert max(most) <= 3 and not alive # two, and one that is being let go
    assert ['score' in g for g in got] == [True]*10 + [False]*2 and [g['status'] for g in got[10:]] == [422, 422]
