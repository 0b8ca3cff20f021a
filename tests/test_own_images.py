"A person's own images: dropped, fitted, stopped, resumed, inspected, written."
import copy, csv, io, re, threading, time
from pathlib import Path
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from PIL import Image

from dynad.detector import DynAD
from dynad.method import Decision
from dynad.cautions import cautions_html, find_cautions, held_out_images, unlike
from dynad.explorer import Explorer
from dynad.inspection import FitProgress, save_uploads
from dynad.own_images import OwnImages
from dynad.data import open_folder
from dynad.images import DataError

FAST = {'latents.finetune_steps': 2, 'denoiser.steps': 24, 'denoiser.checkpoint_every': 4, 'adaptation.gamma': 0}

def upload(path, name=None): return dict(name=name or path.name, type='image/png', size=path.stat().st_size, content=memoryview(path.read_bytes()), last_modified=datetime.now(timezone.utc))

def test_open_folder(tmp_path, boards):
    with pytest.raises(DataError, match='no such folder; name the folder that holds your normal images'): open_folder(tmp_path/'none')
    with pytest.raises(DataError, match='no image in there'): open_folder(tmp_path)
    assert len(open_folder(boards.root).train) == 24 == len(open_folder(boards.root/'train'/'good').train) and open_folder(boards.root/'train').layout == 'folder'

def test_save_uploads(tmp_path, boards):
    p = boards.train[0].image
    assert save_uploads([upload(p, '../../escape.png')], tmp_path) == [tmp_path/'escape.png']
    with pytest.raises(DataError, match='notes.txt: not an image'): save_uploads([upload(p, 'notes.txt')], tmp_path)
    bad = tmp_path/'cut.png'
    bad.write_bytes(p.read_bytes()[:900])
    with pytest.raises(DataError, match='^cut.png: damaged'): save_uploads([upload(bad)], tmp_path/'good')
    with pytest.raises(DataError, match='^cut.png: damaged.*; none of the 3 dropped files was kept'): save_uploads([upload(p, 'a.png'), upload(bad), upload(p, 'c.png')], tmp_path/'good')
    assert not list((tmp_path/'good').iterdir())
    assert [q.name for q in save_uploads([upload(p, 'a.png'), upload(p, 'c.png')], tmp_path/'good')] == ['a.png', 'c.png'] == sorted(q.name for q in (tmp_path/'good').iterdir())

@pytest.fixture(scope='module')
def own(boards, tmp_path_factory):
    w = OwnImages(tmp_path_factory.mktemp('own'), preset='smoke', overrides=FAST)
    w.normal.upload.value = tuple(upload(s.image) for s in boards.train)
    done = w.model.step_done
    def stopping(stage, step, loss):
        done(stage, step, loss)
        w.made.append((stage, step))
        if stage == 'denoiser' and step == 9: w.stop_button.click()
    w.model.step_done, w.made = stopping, []
    w.fit().wait()
    w.after_stop = w.status.value, w.model.detector, w.fit_button.disabled, w.stop_button.disabled
    w.made.clear()
    w.fit().wait()
    w.model.step_done = done
    yield w
    w.close()

def test_stopped_and_resumed(own):
    assert own.after_stop == ('stopped at step 10 of 24 of the denoiser; press fit to go on', None, False, True)
    assert own.model.detector is not None and 'fitted on 19 images, threshold from 5 others; preset smoke' in own.status.value
    assert [step for stage, step in own.made if stage == 'denoiser'] == list(range(10, 24)) # the last session went on from step 10
    assert {k: len(v) for k, v in own.model.progress.losses.items()} == {'autoencoder': 2, 'denoiser': 24, 'phi': 0} # of all sessions
    assert Image.open(io.BytesIO(own.loss_curve.value)).size[0] > 200 and not own.fit_button.disabled and own.stop_button.disabled

def test_progress_of_every_stage(tmp_path):
    w = OwnImages(tmp_path)
    steps = {'autoencoder': 4, 'denoiser': 10, 'phi': 2}
    w.model.progress = FitProgress(steps)
    seen = []
    for stage, n in steps.items():
        for k in range(n): w.step_done(stage, k, 1/(k + 1)); seen.append((w.status.value, w.progress.value))
    assert 'part 1 of 3, the autoencoder: step 1 of 4, loss 1.0000' == seen[0][0] and seen[0][1] == .25
    assert 'part 2 of 3, the denoiser: step 1 of 10' in seen[4][0] and seen[4][1] == .1 and 'part 3 of 3, φ: step 2 of 2' in seen[-1][0] and seen[-1][1] == 1
    assert {k: len(v) for k, v in w.model.progress.losses.items()} == steps and Image.open(io.BytesIO(w.loss_curve.value)).size[0] > 700
    w.close()

def test_warnings(own, boards):
    held = held_out_images(own.model.detector, open_folder(own.model.folder/'good'))
    rows = find_cautions(own.model.detector, held, [s.image for s in boards.train])
    assert rows[0].what == '24 normal images' and rows[0].serious
    assert 'do not trust: 24 normal images' in own.warnings.value and 'No computed warning' in cautions_html([])
    big = own.model.folder/'big.png'
    Image.new('RGB', (900, 600)).save(big)
    assert 'images of 900 pixels are inspected at 64' in [d for d in find_cautions(own.model.detector, held, [big]) if d.what == 'small defects vanish'][0].text
    far = own.model.detector.parts.dic.train_distance.max()*torch.tensor([.5, 1., 5.])
    assert unlike(far, own.model.detector).tolist() == [False, False, True]

def test_inspected_and_exported(own, boards):
    bad = [s for s in boards.test if s.label]
    own.new.upload.value = tuple(upload(s.image, f'{k}.png') for k, s in enumerate(bad))
    own.wait()
    assert own.message.value == '' and f'of {len(bad)} classified as anomalous (preset smoke: a test' in own.answer.value and 'verdicts mean nothing' in own.scores.value
    sheet = own.sheet.html.value
    assert sheet.count('<img alt="') == 4*len(bad) and all(f'overlay of {k}.png' in sheet and f'<code>{k}.png</code>' in sheet for k in range(len(bad)))
    assert sheet.count('>anomalous</b>') == int(own.model.prediction.anomalous.sum()) and '<th scope="col">reconstruction</th>' in sheet
    path = own.export()
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == len(bad) and float(rows[0]['score']) == pytest.approx(float(own.model.prediction.score[0]))
    assert np.array_equal(np.load(path.parent/f"{rows[0]['files']}_map.npy"), own.model.prediction.map[0, 0].numpy())
    assert {p.suffix for p in path.parent.iterdir()} == {'.npy', '.png', '.csv', '.json'}

def test_the_same_view_after_a_restart(own, tmp_path):
    again = OwnImages(own.model.folder).wait(120)
    assert again.message.value == '' and again.model.detector is not None and again.preset.value == 'smoke' and again.normal.folder.value == ''
    assert (again.scores.value, again.warnings.value, again.status.value, again.model.progress.losses) == (own.scores.value, own.warnings.value, own.status.value, own.model.progress.losses)
    assert again.sheet.html.value == own.sheet.html.value and again.answer.value.startswith(f'{int(own.model.prediction.anomalous.sum())} of {len(own.model.files)} classified as anomalous') and again.loss_curve.value == own.loss_curve.value and not again.export_button.disabled
    again.close()
    other = OwnImages(own.model.folder, normal=tmp_path).wait(120) # other images than the run's: nothing of it is shown as theirs
    assert other.model.detector is None and 'learned from' in other.status.value
    other.close()

def test_fit_is_pressed_while_images_are_inspected(own, monkeypatch):
    inspecting, fitting, go = threading.Event(), threading.Event(), threading.Event()
    model = own.model.detector
    def predict(*args): inspecting.set(); go.wait(20); return DynAD.predictions(model, *args)
    def fit(self, *args, **kwargs): fitting.set(); go2.wait(20); return model
    go2 = threading.Event()
    monkeypatch.setattr(model, 'predictions', predict, raising=False); monkeypatch.setattr(DynAD, 'fit', fit)
    own.inspect()
    assert inspecting.wait(20)
    own.fit()
    go.set()
    assert fitting.wait(60)
    assert own.fit_button.disabled and not own.stop_button.disabled and own.inspect_button.disabled and not own.export_button.disabled
    own.normal.upload.value = (dict(upload(own.model.files[0], 'notes.txt')),)  # an error beside it changes nothing
    assert 'notes.txt' in own.message.value and own.fit_button.disabled and not own.stop_button.disabled
    go2.set()
    own.wait()
    assert own.model.prediction is None and own.export_button.disabled and 'press inspect' in own.scores.value and own.sheet.ui.layout.display == 'none' # no old results beside a new detector
    assert not own.fit_button.disabled and own.stop_button.disabled

def test_results_stay_with_their_detector(own):
    own.inspect().wait()
    other = copy.copy(own.model.detector)
    other._decision = Decision(99., 99.)
    limit, own.model.detector = own.model.detector.decision.image_threshold, other
    rows = list(csv.DictReader(own.export().open()))
    assert {float(r['threshold']) for r in rows} == {limit}
    own.model.detector = own.model.inspected_by

def test_mistakes_show_in_the_widget(own, tmp_path):
    own.new.folder.value = str(tmp_path/'none')
    own.inspect().wait()
    assert 'no such folder; name a folder of images to inspect' in own.message.value and not own.inspect_button.disabled
    own.normal.folder.value = str(tmp_path)
    own.fit().wait()
    assert 'no image in there' in own.message.value and not own.fit_button.disabled
    fresh = OwnImages(tmp_path/'fresh')
    fresh.inspect().wait()
    assert 'nothing is fitted yet; press fit first' in fresh.message.value
    fresh.export()
    assert 'nothing is inspected yet; press inspect first' in fresh.message.value
    fresh.close()

def test_every_message_stands_beside_the_button(own, tmp_path):
    where = lambda: [k for k, slot in own.slots.items() if own.message in slot.children]
    own.new.folder.value = str(tmp_path/'none')
    own.inspect().wait()
    assert where() == ['inspect'] and 'no such folder' in own.message.value and own.answer.value == ''
    own.normal.upload.value = (dict(upload(own.model.run/'run.json', 'notes.txt')),)
    assert where() == ['normal'] and 'notes.txt' in own.message.value
    own.normal.folder.value = str(tmp_path)
    own.fit().wait()
    assert where() == ['fit'] and 'no image in there' in own.message.value
    own.normal.folder.value = ''

def test_all_images_are_on_a_page_of_the_sheet(own, boards, monkeypatch):
    monkeypatch.setattr('dynad.own_parts.SHOWN', 4)
    own.new.folder.value = str(boards.root/'test')
    own.inspect().wait()
    n, names = len(own.model.files), set()
    for k in range(-(-n//4)):
        names |= set(re.findall('<code>(.*?)</code>', own.sheet.html.value))
        assert own.sheet.later.disabled == (k == -(-n//4) - 1)
        own.sheet.later.click()
    assert names == {f.name for f in own.model.files} and f'of {n} images' in own.sheet.text.value

def test_what_was_inspected_opens_in_the_explorer(own, boards):
    own.new.folder.value = str(boards.root/'test'/'good')
    own.inspect().wait()
    own.explore().wait(200)
    x = own.explorer
    x.wait(200)
    assert own.message.value == '' == x.message.value and own.below.children == (x.ui,)
    assert [s.image for s in x.session.samples] == own.model.files and not x.session.known.any() and 'images without a label' in x.session.note
    assert x.model.measured.scores == pytest.approx(own.model.prediction.score.numpy(), abs=2e-3)
    assert not x.model.wrong.any() and 'without labels' in x.metrics.value and 'nobody has labelled it' in x.facts.value and 'wrong' not in x.facts.value

def test_a_run_without_test_images_opens(own):
    x = Explorer(own.model.run)
    x.shown(200)
    assert x.session.without_test and 'no test images' in x.session.note and len(x.session) == 5 and x.message.value == ''
    assert 'A_map' in x.captions['A_map'].value and x.model.measured.metrics['i_auroc'] is None
    x.close()

def test_deciding_and_marking_what_was_inspected(own, boards, tmp_path):
    "The threshold that is kept decides about the sheet; a marked image is learned from and inspected again."
    own.new.folder.value = str(Path(boards.root)/'test'/'good')
    own.inspect().wait()
    b, m = own.bench, own.model
    assert own.message.value == '' and b.ui.layout.display is None and len(b.bench.unknown) == len(m.files)
    low = float(m.prediction.score.min()) - .01
    b.value.value = low
    assert not m.prediction.anomalous.all() or low > m.inspected_by.decision.image_threshold # only tried
    b.save.click()
    assert b.message.value == '' and m.prediction.anomalous.all() and m.inspected_by.decision.chosen.at == pytest.approx(low, rel=1e-3)
    b.reset.click()
    own.marking.normal.click()
    assert own.marking.message.value == '' and '<b>normal</b>' in own.marking.said.value
    own.marking.try_it.click()
    own.wait(300)
    assert own.marking.message.value == '' and 'without training' in own.marking.changes.value and 'called anomalous' in own.marking.changes.value
    own.wait()
    assert m.inspected_by.joined == (0,) and own.message.value == ''
    own.marking.undo.click()
    own.wait()
    assert m.inspected_by.joined == ()
    own.marking.withdraw.click()

def test_judging_does_not_wait_for_the_verdict(boards, tmp_path, monkeypatch):
    "The verdict of a fresh fit reconstructs every held-out image at every T̂; an image that is judged meanwhile waits for a few of them."
    w = OwnImages(tmp_path/'own', normal=Path(boards.root)/'train'/'good', preset='smoke', overrides=FAST)
    try:
        w.fit().wait(300)
        assert 'Nobody knows yet' in w.decide.verdict.text.value
        d, f = w.model.detector, boards.test[0].image
        w.model.inspect([f])                                                           # once, so that nothing is loaded for the first time
        measured, slow = [], 1.
        plain = type(d.held_out).z_hat
        def z_hat(walk, t_hat=None, rows=None):
            if walk.set is d.held_out_set and rows is not None: measured.append(time.monotonic()); time.sleep(slow)
            return plain(walk, t_hat, rows)
        monkeypatch.setattr(type(d.held_out), 'z_hat', z_hat)
        import shutil; shutil.rmtree(d.held_out_set.store.root/'stages'/'reconstructions', ignore_errors=True)
        for k in [k for k in d.held_out_set.memory if k[0] == 'reconstructions']: del d.held_out_set.memory[k]
        start = time.monotonic()
        w.decide.verdict.ask()
        while not measured: time.sleep(.01)
        asked = time.monotonic()
        w.model.inspect([boards.test[1].image])                                        # as the worker's thread does
        judged = time.monotonic() - asked
        assert w.decide.verdict.wait(300)
        whole = time.monotonic() - start
        assert w.decide.verdict.message.value == '' and len(measured) >= 6 and judged < 3*slow < whole/2
    finally: w.close()

def test_a_region_and_tiles_reach_fit_and_predict(boards, tmp_path):
    "Drawn or dropped, the region counts in the fit and in the sheet; tiles are inspected too, at their own resolution."
    w = OwnImages(tmp_path/'own', normal=Path(boards.root)/'train'/'good', new=Path(boards.root)/'test'/'good', preset='smoke', overrides=FAST)
    try:
        r = w.region
        r.draw_button.click()
        assert r.drawer.image and r.size == (128, 128) and 'draw around' in r.text.value
        r.drawer.outlines = [[[0, 0], [.5, 0], [.5, 1], [0, 1]]]                       # the left half, as the pointer gives it
        assert re.search('5[01]% of the image counts', r.text.value) and w.chosen == {'data.roi': str(tmp_path/'own'/'roi.png')}
        w.fit().wait(300)
        d = w.model.detector
        assert w.message.value == '' and d.inside[:, :31].all() and not d.inside[:, 33:].any() and 'of the image counts' in w.status.value
        w.inspect().wait(300)
        assert w.message.value == '' and not w.model.prediction.mask[..., 33:].any() and 'Nobody knows yet' in w.decide.verdict.text.value
        Image.fromarray(np.full((40, 60), 255, np.uint8)).save(tmp_path/'all.png')
        r.upload.value = (upload(tmp_path/'all.png', 'mine.png'),)
        assert '100% of the image counts' in r.text.value and not r.drawer.outlines
        (tmp_path/'dark.png').write_bytes((tmp_path/'all.png').read_bytes()); Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path/'dark.png')
        r.upload.value = (upload(tmp_path/'dark.png', 'dark.png'),)
        assert 'dark.png: nothing in it is brighter' in w.message.value or 'dark.png: a region of interest without' in w.message.value
        assert w.message in w.slots['fit'].children and '100%' in r.text.value            # the one of before stays
        r.clear_button.click()
        assert w.chosen == {}
        w.tile.value = 16
        w.fit().wait(60)
        assert 'data.tile' in w.message.value
        w.tile.value = 64
        w.fit().wait(400)
        d = w.model.detector
        assert w.message.value == '' and d.tiling.tile == 64 and d.roi is None and 'tiles of 64 pixels' in w.status.value
        w.inspect().wait(300)
        p = w.model.prediction
        assert w.message.value == '' and p.map.shape[-2:] == tuple(d.map_shape) and w.sheet.html.value.count('<img') == 3*len(p) and w.explore_button.disabled
        assert w.export().exists() and w.message.value == ''
        again = OwnImages(tmp_path/'own').wait(300)
        assert again.tile.value == 64 and again.model.detector.tiling.tile == 64 and again.message.value == ''
        again.close()
    finally: w.close()
