"A person's own pictures: dropped, fitted, stopped, resumed, judged, written."
import csv, io
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from PIL import Image

from dynad.own_pictures import OwnPictures, doubts, doubts_html, heap, keep, unlike
from dynad.pictures import DataError

FAST = {'latents.finetune_steps': 2, 'denoiser.steps': 24, 'denoiser.checkpoint_every': 4, 'adaptation.gamma': 0}

def upload(path, name=None): return dict(name=name or path.name, type='image/png', size=path.stat().st_size, content=memoryview(path.read_bytes()), last_modified=datetime.now(timezone.utc))

def test_heap(tmp_path, boards):
    with pytest.raises(DataError, match='no such folder; name the folder that holds your good pictures'): heap(tmp_path/'none')
    with pytest.raises(DataError, match='no picture in there'): heap(tmp_path)
    assert len(heap(boards.root).train) == 24 == len(heap(boards.root/'train'/'good').train) and heap(boards.root/'train').layout == 'heap'

def test_keep(tmp_path, boards):
    p = boards.train[0].image
    assert keep([upload(p, '../../escape.png')], tmp_path) == [tmp_path/'escape.png']
    with pytest.raises(DataError, match='notes.txt: not a picture'): keep([upload(p, 'notes.txt')], tmp_path)
    bad = tmp_path/'cut.png'
    bad.write_bytes(p.read_bytes()[:900])
    with pytest.raises(DataError, match='^cut.png: damaged'): keep([upload(bad)], tmp_path/'good')
    assert not list((tmp_path/'good').iterdir())

@pytest.fixture(scope='module')
def own(boards, tmp_path_factory):
    w = OwnPictures(tmp_path_factory.mktemp('own'), preset='smoke', overrides=FAST)
    w.good_upload.value = tuple(upload(s.image) for s in boards.train)
    trained = w._trained
    def stopping(stage, step, loss):
        trained(stage, step, loss)
        if step == 9: w.stop_button.click()
    w._trained = stopping
    w.fit().wait()
    w.after_stop = w.status.value, w.model
    w._trained = trained
    w.fit().wait()
    yield w
    w.close()

def test_stopped_and_resumed(own):
    assert own.after_stop == ('stopped at step 10 of 24 of the denoiser; press fit to go on', None)
    assert own.model is not None and 'fitted on 19 pictures, threshold from 5 others; preset smoke' in own.status.value
    assert len(own.losses) == 14 and own._at == 24 # the last session went on from step 10
    assert Image.open(io.BytesIO(own.loss_curve.value)).size[0] > 200 and not own.fit_button.disabled and own.stop_button.disabled

def test_warnings(own, boards):
    rows = doubts(own.model, [s.image for s in boards.train])
    assert rows[0].what == '24 good pictures' and rows[0].serious
    assert 'do not trust: 24 good pictures' in own.warnings.value and 'No computed warning' in doubts_html([])
    big = own.folder/'big.png'
    Image.new('RGB', (900, 600)).save(big)
    assert 'pictures of 900 pixels are judged at 64' in [d for d in doubts(own.model, [big]) if d.what == 'small defects vanish'][0].text
    far = own.model.dic.train_distance.max()*torch.tensor([.5, 1., 5.])
    assert unlike(far, own.model).tolist() == [False, False, True]

def test_judged_and_exported(own, boards):
    bad = [s for s in boards.test if s.label]
    own.judge_upload.value = tuple(upload(s.image, f'{k}.png') for k, s in enumerate(bad))
    own.wait()
    assert own.message.value == '' and f'of {len(bad)} called defective' in own.status.value
    assert Image.open(io.BytesIO(own.sheet.value)).size == (4*156, len(bad)*156)
    path = own.export()
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == len(bad) and float(rows[0]['score']) == pytest.approx(float(own.prediction.score[0]))
    assert np.array_equal(np.load(path.parent/f"{rows[0]['files']}_map.npy"), own.prediction.map[0, 0].numpy())
    assert {p.suffix for p in path.parent.iterdir()} == {'.npy', '.png', '.csv'}

def test_mistakes_show_in_the_widget(own, tmp_path):
    own.judge_folder.value = str(tmp_path/'none')
    own.judge().wait()
    assert 'no such folder; name a folder of pictures to judge' in own.message.value and not own.judge_button.disabled
    own.good_folder.value = str(tmp_path)
    own.fit().wait()
    assert 'no picture in there' in own.message.value and not own.fit_button.disabled
    fresh = OwnPictures(tmp_path/'fresh')
    fresh.judge().wait()
    assert 'nothing is fitted yet; press fit first' in fresh.message.value
    fresh.export()
    assert 'nothing is judged yet; press judge first' in fresh.message.value
    fresh.close()
