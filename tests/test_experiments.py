"What the notebooks of nbs/papers share: subjects, one pool, and a record in which nothing on stand-in data meets a printed number."
import json, os

import numpy as np
import pytest
import torch
from PIL import Image

from dynad.config import ConfigError
from dynad.download import PUBLISHED
import dynad.findings, dynad.subjects, dynad.systems
from dynad.beside import long_comparison, opening, printed_row, printed_table, side_by_side
from dynad.experiments import printed_value
from dynad.findings import Differences, by_class, enter, enter_difference, enter_nulls, enter_systems, verdict
from dynad.method import METHODS, register
from dynad.record import Record, compared
from dynad.subjects import (
    NULLS, OPENED, find_set, fitted, measure, null_rows, paired, slim, subjects)
from dynad.show import curve
from dynad.systems import Bar, check_methods, measured_by, reason_of, shortened, systems

QUICK = {'denoiser.steps': 10, 'latents.finetune_steps': 2, 'denoiser.checkpoint_every': 10}
PARAMETERS = dict(data='auto', preset='smoke', seeds=[0], n_boot=20)

@pytest.fixture(scope='module')
def pool(tmp_path_factory):
    "A pool of this file's own."
    old, folder = os.environ.get('DYNAD_POOL'), tmp_path_factory.mktemp('pool')
    os.environ['DYNAD_POOL'] = str(folder)
    yield folder
    os.environ.pop('DYNAD_POOL') if old is None else os.environ.__setitem__('DYNAD_POOL', old)

@pytest.fixture(scope='module')
def board(pool): return subjects('synthetic:board')[0]

@pytest.fixture(scope='module')
def run(board): return fitted(board, 'smoke', 0, QUICK)

@pytest.fixture(scope='module')
def published(tmp_path_factory):
    "BTAD and VisA with the published number of images, all of them links to one of 8×8 pixels: names and counts, not contents."
    root = tmp_path_factory.mktemp('sets')
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(root/'image.png')
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(root/'mask.png')
    def link(kind, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(root/f'{kind}.png', path)
    for c, n in PUBLISHED['btad'].items():
        for folder, k in (('train/ok', n['train']), ('test/ok', n['test good']), ('test/ko', n['test defective'])):
            for i in range(k): link('image', root/'data'/'btad'/c/folder/f'{i:04d}.png')
        for i in range(n['test defective']): link('mask', root/'data'/'btad'/c/'ground_truth'/'ko'/f'{i:04d}.png')
    lines = ['object,split,label,image,mask']
    for c, n in PUBLISHED['visa'].items():
        for kind, label, k in (('Normal', 'normal', n['good']), ('Anomaly', 'anomaly', n['defective'])):
            for i in range(k):
                name = f'{c}/Data/Images/{kind}/{i:04d}.JPG'
                link('image', root/'data'/'visa'/name)
                if label == 'anomaly': link('mask', root/'data'/'visa'/c/'Data'/'Masks'/'Anomaly'/f'{i:04d}.png')
                lines.append(f"{c},{'train' if label == 'normal' and i >= 50 else 'test'},{label},{name},{f'{c}/Data/Masks/Anomaly/{i:04d}.png' if label == 'anomaly' else ''}")
    (root/'data'/'visa'/'split_csv').mkdir()
    (root/'data'/'visa'/'split_csv'/'1cls.csv').write_text('\n'.join(lines) + '\n')
    return root/'data'

@pytest.fixture
def real(published, monkeypatch):
    monkeypatch.setenv('DYNAD_DATA', str(published))
    return published

# subjects

def test_auto_is_a_stand_in_that_says_so_where_the_set_is_missing(monkeypatch, tmp_path):
    for value in (None, str(tmp_path), str(tmp_path/'absent')):
        monkeypatch.delenv('DYNAD_DATA', raising=False) if value is None else monkeypatch.setenv('DYNAD_DATA', value)
        s, = subjects('auto', 'visa')
        assert s.real is None and s.row is None and s.label == 'synthetic board (stand-in)' and not s.whole

def test_auto_is_the_real_set_where_it_is_found(real):
    found = subjects('auto', 'btad')
    assert [(s.name, s.label, s.real, s.row) for s in found] == [(f'btad/{c}', f'BTAD {c}', 'btad', f'class {c}') for c in ('01', '02', '03')]
    assert all(s.whole for s in found) and len(found[0].dataset().samples) == 470
    assert [s.row for s in subjects('visa/chewinggum')] == ['chewing gum'] and len(subjects('auto', 'visa')) == 12
    assert [s.name for s in subjects('auto', 'mvtec')] == ['synthetic_board']
    assert [s.name for s in subjects('synthetic:gear, btad/02')] == ['synthetic_gear', 'btad/02']

def test_one_image_short_is_not_the_published_set(real, tmp_path, monkeypatch):
    import shutil
    shutil.copytree(real/'btad', tmp_path/'BTAD', copy_function=os.link)
    (tmp_path/'BTAD'/'02'/'test'/'ok'/'0003.png').unlink()
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path))
    OPENED.clear()
    assert find_set('btad') == tmp_path/'BTAD' and [s.whole for s in subjects('btad')] == [True, False, True]

def test_other_images_are_stand_ins_whatever_their_name(tmp_path, monkeypatch):
    for name in ('cookies', 'mvtec_leather_part', 'visa_like'): (tmp_path/name/'train'/'good').mkdir(parents=True)
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path))
    assert [(s.label, s.real) for s in subjects('cookies,mvtec_leather_part')] == [('cookies (stand-in)', None), ('mvtec leather part (stand-in)', None)]
    (tmp_path/'visa_like'/'remark.txt').write_text('images halved\n')
    s, = subjects(str(tmp_path/'visa_like'))
    assert s.real is None and s.label == 'visa like (stand-in; images halved)'
    assert [s.label for s in subjects('elpv/mono')] == ['ELPV solar cells mono (stand-in)']

def test_a_remark_makes_a_category_of_the_paper_a_stand_in_beside_its_printed_row(real, tmp_path, monkeypatch):
    import shutil
    shutil.copytree(real/'btad', tmp_path/'btad', copy_function=os.link)
    (tmp_path/'btad'/'02'/'remark.txt').write_text('pictures scaled by 0.5. Published figures do not apply.\n')
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path))
    OPENED.clear()
    found = subjects('auto', 'btad')
    assert [(s.whole, s.real, s.row) for s in found] == [(True, 'btad', 'class 01'), (False, None, 'class 02'), (True, 'btad', 'class 03')]
    assert found[1].label == 'BTAD 02 (stand-in; pictures scaled by 0.5)'
    assert found[1].dataset().remark.startswith('pictures scaled by 0.5.')
    record = Record('table2', tmp_path/'out', PARAMETERS)
    record.add(None, 'Ours', 'i_auroc', .9, subject=found[1])
    assert record.stand_in and record.sets == [] and compared(record)[0]['paper'] is None
    assert '02 (stand-in; pictures scaled by 0.5)' in side_by_side(record, ('i_auroc',)).caption
    (tmp_path/'btad'/'remark.txt').write_text('a copy with other names') # of the whole set
    assert not [s for s in subjects('auto', 'btad') if s.real]

@pytest.mark.parametrize('name', ['bottle', 'mvtec_bottle'])
def test_a_folder_named_as_a_category_stands_beside_its_printed_row(name, real, tmp_path):
    shown = real.parent/name/name
    if not shown.exists():
        for part in ('train/good', 'test/good', 'test/cut', 'ground_truth/cut'): (shown/part).mkdir(parents=True)
        for file in ('train/good/0.png', 'test/good/0.png', 'test/cut/0.png', 'ground_truth/cut/0_mask.png'):
            os.link(real.parent/('mask.png' if 'truth' in file else 'image.png'), shown/file)
        (shown/'remark.txt').write_text('pictures halved\n')
    s, = subjects(str(shown), 'mvtec')
    assert (s.real, s.row, s.whole) == (None, 'bottle', False) and s.label.endswith('bottle (stand-in; pictures halved)')
    assert [x.row for x in subjects(str(shown), 'visa') + subjects(str(shown), None)] == [None, None]
    record = Record('table3', tmp_path, PARAMETERS)
    record.add(None, 'Ours', 'i_auroc', .9, subject=s)
    row, values = printed_row(record)
    assert row == 'bottle' and values['Ours', 'i_auroc'] == pytest.approx(printed_value('table3', 'bottle', 'Ours', 'i_auroc'))
    [line] = compared(record)
    assert (line['row'], line['paper'], line['data']) == ('bottle', None, s.label) and record.stand_in

@pytest.mark.parametrize('data, wanted, said', [
    ('visa', 'visa', r"data = 'visa': VisA is not here; set DYNAD_DATA to a folder that holds it as visa or VisA"),
    ('synthetic:shoe', 'visa', r"data = 'synthetic:shoe': there is no such product; allowed: .*synthetic:board"),
    ('nowhere', 'visa', r"data = 'nowhere': no such folder here or in DYNAD_DATA"),
    (' , ', 'visa', r"names nothing; e.g. auto"),
    ('auto', 'coco', r"wanted = 'coco'; allowed: visa, btad, mvtec")])
def test_what_cannot_be_found_is_named_with_its_cure(data, wanted, said, monkeypatch, tmp_path):
    monkeypatch.setenv('DYNAD_DATA', str(tmp_path))
    with pytest.raises(ConfigError, match=said): subjects(data, wanted)

def test_a_category_that_is_missing(real):
    with pytest.raises(ConfigError, match=r"data = 'btad/04': .*btad holds 01, 02, 03; choose one of those"): subjects('btad/04')

# one pool

def test_nothing_is_trained_twice(run, board, pool):
    stages = lambda: sorted(str(p.relative_to(pool)) for p in (pool/'stages').glob('*/*') if p.is_dir() and p.parent.name in ('autoencoder', 'denoiser', 'phi', 'patch_bank'))
    before = stages()
    again, _ = fitted(board, 'smoke', 0, QUICK)
    other = run[0].with_settings({'reconstruction.omega': .5, 'fusion.lam': .2, 'dic.K': 3})
    assert stages() == before and again.parts.hashes == run[0].parts.hashes
    assert other.parts.hashes['denoiser'] == run[0].parts.hashes['denoiser'] and other.config.reconstruction.omega == .5 and run[0].config.reconstruction.omega == 0
    unadapted, _ = fitted(board, 'smoke', 0, QUICK | {'adaptation.gamma': 0})
    assert unadapted.parts.hashes['denoiser'] == run[0].parts.hashes['denoiser'] and unadapted.parts.hashes['phi'] != run[0].parts.hashes['phi']

def test_what_would_need_training_is_refused(run):
    with pytest.raises(ConfigError, match="adaptation.gamma: would need training; fit again with adaptation.gamma = 3"): run[0].with_settings({'adaptation.gamma': 3, 'fusion.lam': 1})
    run[0].with_settings({'adaptation.gamma': run[0].config.adaptation.gamma})
    with pytest.raises(ConfigError, match='fusion.lam = 2'): run[0].with_settings({'fusion.lam': 2})

def test_seeds_change_the_run_but_not_the_images(run, board):
    other, data = fitted(board, 'smoke', 1, QUICK)
    assert data.fingerprint == run[1].fingerprint and other.parts.hashes['denoiser'] != run[0].parts.hashes['denoiser']

def test_measures_and_pairs(run):
    m = measure(*run, n_boot=20)
    assert m == m | {k: measure(*run, n_boot=20)[k] for k in ('i_auroc', 'pro', 'p_auroc')}
    noised = measure(run[0].with_settings({'reconstruction.omega': 1.}), run[1], n_boot=20)
    for k in ('i_auroc', 'pro'):
        d = paired(m, noised, k, 50)
        assert d['difference'] == pytest.approx(m[k]['value'] - noised[k]['value'], abs=1e-4) and d['low'] <= d['high']
        assert paired(m, m, k, 20) == dict(difference=0, low=0, high=0)
        assert paired(noised, m, k, 50)['difference'] == -d['difference']
    nulls = null_rows(*run, n_boot=20)
    assert tuple(nulls) == NULLS and 'pro' not in nulls['neighbour distance only'] and nulls['neighbour distance only']['maps'] is None
    assert nulls['T̂ = 0']['t_hat'].eq(0).all() and not torch.equal(nulls['untrained denoiser']['scores'], m['scores'])
    with pytest.raises(ValueError, match='gives no map; use an image-level metric'): paired(m, nulls['neighbour distance only'], 'pro')
    with pytest.raises(ValueError, match="metric = 'auc'; allowed: i_auroc"): paired(m, m, 'auc')

def test_what_is_kept_of_many_measurements(run):
    a, b = (measure(run[0].with_settings({'fusion.lam': v}), run[1], n_boot=20) for v in (.2, .9))
    small = slim(a, pixels=True)
    assert not {'maps', 'masks', 'walk'} & small.keys() and 'pixels' not in slim(a) and slim(a)['pro'] == a['pro']
    assert not [k for k, v in slim(a).items() if isinstance(v, torch.Tensor) and v.ndim > 1]
    for k in ('i_auroc', 'pro'): assert paired(small, slim(b, pixels=True), k, 20) == paired(a, b, k, 20)

def test_verdicts_without_an_interval():
    assert verdict('a above b', [dict(difference=.02, low=None, high=None)]) == 'a above b: not judged without an interval (+2.0 points).'
    assert paired(dict(pro=dict(value=.5)), dict(pro=dict(value=.4)), 'pro', 0) == dict(difference=pytest.approx(.1), low=None, high=None)
    assert verdict('a above b', [dict(difference=None, low=None, high=None)]) == 'a above b: not defined on these images.'

# the record

def lines(record): return {(l['row'], l['column'], l['metric'], l['data']): l for l in compared(record)}

def test_stand_in_data_never_meet_a_printed_number(board, tmp_path):
    for row in ('candle', 'average', None):
        r = Record('table1', tmp_path, PARAMETERS).add(row, 'Ours', 'i_auroc', .9, n=46, seed=0, subject=board)
        assert all(l['paper'] is None and l['difference'] is None for l in compared(r)) and r.stand_in
        assert set(r.comparison().paper) == set(r.comparison().difference) == {'—'} and 'stand-in' in r.comparison().data.iloc[0] and 'smoke preset' in r.comparison().data.iloc[0]

def test_without_any_subject_nothing_is_compared(tmp_path):
    OPENED.clear()
    r = Record('table5', tmp_path, PARAMETERS).add('dic', 'Ours', 'pro', .94)
    assert r.stand_in and compared(r)[0]['paper'] is None

def test_a_whole_category_and_a_whole_set_are_compared(real, tmp_path):
    r = Record('table2', tmp_path, PARAMETERS | {'preset': 'paper'})
    for seed, shift in ((0, 0.), (1, .02)):
        for s, v in zip(subjects('btad'), (.9, .8, .7)): r.add(None, 'Ours', 'pro', v + shift, v - .1, v + .1, n=len(s.dataset().test), seed=seed, subject=s)
    r.add('average', 'Ours', 'i_auroc', .5, n=741, seed=0, null=True)
    got = lines(r)
    first = got['class 01', 'Ours', 'pro', 'BTAD 01']
    assert first['paper'] == 80.0 and first['ours'] == pytest.approx(91.0) and first['difference'] == pytest.approx(11.0) and (first['least'], first['most']) == pytest.approx((90., 92.)) and first['seeds'] == [0, 1] and first['n'] == 70
    assert not r.stand_in and r.sets == ['BTAD']
    r.rows = [x for x in r.rows if x['row'] != 'average']
    mean = lines(r)['average', 'Ours', 'pro', 'BTAD']
    assert mean['paper'] == 83.2 and mean['ours'] == pytest.approx(81.0) and mean['n'] == 741
    r.rows = [x for x in r.rows if x['subject'] != 'btad/03']
    assert lines(r)['average', 'Ours', 'pro', 'BTAD 01, BTAD 02']['paper'] is None # two of three classes are no average
    text = r.comparison()
    assert text.loc[('class 01', 'Ours', 'PRO'), 'difference'] == '+11.0 [+0.0, +20.0]' and '[80.0, 100.0], 90.0 … 92.0 over seeds' in text.loc[('class 01', 'Ours', 'PRO'), 'n, seeds, interval']

def test_an_average_has_an_interval(real, tmp_path):
    "Half-widths: the mean over seeds, which see the same images; in squares over classes, which do not."
    r = Record('table2', tmp_path, PARAMETERS | {'preset': 'paper'})
    for seed in (0, 1):
        for s, v, w in zip(subjects('btad'), (.9, .8, .7), (.03, .04, .12)): r.add(None, 'Ours', 'pro', v, v - w - .01*seed, v + w/2, n=10, seed=seed, subject=s)
    mean = lines(r)['average', 'Ours', 'pro', 'BTAD']
    down = ((.035**2 + .045**2 + .125**2)**.5)/3
    assert (mean['low'], mean['high']) == pytest.approx((80 - 100*down, 80 + 100*.13/6)) and (mean['least'], mean['most']) == pytest.approx((80, 80))
    assert (mean['difference_low'], mean['difference_high']) == pytest.approx((mean['low'] - 83.2, mean['high'] - 83.2))
    assert r.comparison().loc[('average', 'Ours', 'PRO'), 'difference'] == f"-3.2 [{mean['low'] - 83.2:+.1f}, {mean['high'] - 83.2:+.1f}]"
    r.rows[0]['low'] = None # one row without: no interval is made up
    assert lines(r)['average', 'Ours', 'pro', 'BTAD']['low'] is None and r.comparison().loc[('average', 'Ours', 'PRO'), 'difference'] == '-3.2'

def test_repeats_are_a_range(board, tmp_path):
    r = Record('table9', tmp_path, PARAMETERS).add('batch 1', 'Ours', 'seconds', .15, .13, .17, n=1, seed=0, subject=board, repeats=True).add('batch 1', 'Ours', 'pro', .5, .4, .6, n=1, seed=0, subject=board)
    assert r.comparison()['n, seeds, interval'].tolist() == ['n = 1, seed 0, 0.13 … 0.17', 'n = 1, seed 0, [40.0, 60.0]']

def test_null_models_have_no_printed_number(real, tmp_path):
    s = subjects('btad/01')[0]
    r = Record('table2', tmp_path, PARAMETERS).add(None, 'Ours', 'pro', .2, subject=s, null=True)
    assert compared(r)[0]['paper'] is None and 'null model' in r.comparison().index[0][0]

def test_rows_about_a_whole_set_want_the_whole_set(real, tmp_path):
    found, r = subjects('visa'), Record('table5', tmp_path, PARAMETERS)
    for s in found: r.add('dic', 'Ours', 'pro', .941, n=len(s.dataset().test), seed=0, subject=s)
    l, = compared(r)
    assert l['paper'] == 94.1 and l['difference'] == pytest.approx(0, abs=1e-9) and l['data'] == 'VisA'
    r.rows.pop()
    assert len(compared(r)) == 11 and all(x['paper'] is None for x in compared(r))

def test_the_wrong_real_set_is_a_stand_in(real, tmp_path):
    s = subjects('btad/01')[0]
    r = Record('table1', tmp_path, PARAMETERS).add('candle', 'Ours', 'pro', .9, subject=s)
    assert compared(r)[0]['paper'] is None and r.stand_in and r.sets == ['BTAD 01']

def test_oracle_stands_beside_with_its_gap(board, tmp_path):
    r = Record('table5', tmp_path, PARAMETERS).add('dic', 'Ours', 'pro', .6, subject=board, seed=0).add('dic', 'Ours', 'pro', .75, subject=board, seed=0, oracle=True)
    l, = compared(r)
    assert (l['ours'], l['oracle'], l['gap']) == pytest.approx((60, 75, 15))
    assert r.comparison().iloc[0][['oracle', 'gap']].tolist() == ['75.0', '+15.0']

def test_what_may_not_be_added(tmp_path, board):
    r = Record('table1', tmp_path, PARAMETERS)
    with pytest.raises(ValueError, match='value = 94.1; shares are given in 0…1, not in percent'): r.add('candle', 'Ours', 'pro', 94.1)
    with pytest.raises(ValueError, match='value = nan; a finite number or None is needed'): r.add('candle', 'Ours', 'pro', float('nan'))
    with pytest.raises(ValueError, match='give a row, or a subject that has one'): r.add(None, 'Ours', 'pro', .5)
    assert r.add('one image', 'Ours', 'seconds', 12.5).rows[0]['value'] == 12.5

def test_what_is_left_behind(run, board, tmp_path):
    r = Record('table1', tmp_path/'out', PARAMETERS)
    m = measure(*run, n_boot=20)
    r.add(None, 'Ours', 'pro', **m['pro'], n=m['n'], seed=0, subject=board, model=run[0])
    fig = curve([1., 2.])
    assert r.figure(fig, 'one') is fig and r.note('a direction that does not hold') is r
    saved = json.loads(r.save().read_text())
    assert r.save() == tmp_path/'out'/'table1.json' and (tmp_path/'out'/'one.png').read_bytes()[:4] == b'\x89PNG' and (tmp_path/'out'/'one.pdf').read_bytes()[:4] == b'%PDF'
    assert saved['stand_in'] is True and saved['sets'] == [] and saved['figures'] == ['one'] and saved['notes'] == ['a direction that does not hold'] and saved['parameters'] == PARAMETERS
    assert saved['data'] == [dict(name='synthetic_board', label='synthetic board (stand-in)', real=None, whole=False, fingerprint=run[1].fingerprint, train=60, test=46)]
    assert list(saved['settings'].values()) == [run[0].config.model_dump(mode='json')] and saved['rows'][0]['settings'] in saved['settings']
    assert saved['hardware']['cores'] >= 1 and saved['versions']['dynad'] and saved['minutes'] > 0 and len(saved['commit'] or 'x'*40) >= 40
    assert saved['comparison'] == compared(r) and not list((tmp_path/'out').glob('.*'))

def test_a_figure_without_numbers_still_names_its_data(board, tmp_path):
    r = Record('fig3', tmp_path, PARAMETERS)
    board.dataset()
    assert [s.name for s in r.subjects] == ['synthetic_board'] and r.stand_in

# settings

def test_every_row_carries_the_detector_that_it_was_measured_with(run, board, tmp_path, monkeypatch):
    "The oracle's settings are those that it chose."
    monkeypatch.setattr(dynad.findings, 'fitted', lambda s, preset, seed, overrides=None: run)
    real = measure
    monkeypatch.setattr(dynad.findings, 'measure', lambda model, *a, **k: (m := real(model, *a, **k)) | ({'pro': m['pro'] | {'value': .99}} if model.config.fusion.lam == .75 and model.config.reconstruction.t_max == 80 else {}))
    r = Record('table1', tmp_path, PARAMETERS)
    choices = by_class(r, [board], 'smoke', [0], ('i_auroc', 'pro'), 20, [{'reconstruction.t_max': 80, 'fusion.lam': .75}])
    assert choices.chosen.tolist() == ['t_max = 80, lam = 0.75'] and {x['oracle'] for x in r.rows} == {True, False}
    for x in r.rows:
        c = r.settings[x['settings']]
        assert (c['reconstruction']['t_max'], c['fusion']['lam']) == ((80, .75) if x['oracle'] else (run[0].config.reconstruction.t_max, run[0].config.fusion.lam))

def test_a_difference_carries_both_sides(run, board, tmp_path):
    a, b = (run[0].with_settings({'fusion.lam': v}) for v in (.2, .9))
    r = Record('table5', tmp_path, PARAMETERS)
    enter_difference(r, 'x', 'a − b', measure(a, run[1], 20), measure(b, run[1], 20), ('pro',), 20, subject=board)
    enter(r, 'x', 'a', measure(a, run[1], 0), ('pro',), subject=board, model=b) # what was measured wins
    assert [(r.settings[x['settings']]['fusion']['lam'], x['against'] and r.settings[x['against']]['fusion']['lam']) for x in r.rows] == [(.2, .9), (.2, None)]

# other systems

@pytest.fixture
def broken():
    "A method that fails when it is asked."
    from dynad.method import method_named
    class Broken(method_named('padim')):
        name, title = 'broken', 'broken (toy)'
        def predict_batch(self, images, rows): raise ZeroDivisionError('as a bug would')
    register(Broken)
    yield
    METHODS.pop('broken')

def test_a_system_that_fails_is_a_row_with_its_reason_and_the_others_finish(board, pool, broken):
    rows = list(systems([board], ['broken', 'padim', 'uniad'], n_boot=20))
    assert [(r.title, r.status) for r in rows] == [('broken (toy)', 'failed'), ('PaDiM', 'done'), ('UniAD', 'not run')]
    assert rows[0].reason == 'ZeroDivisionError: as a bug would' and 'it would take' in rows[2].reason
    assert rows[0].measured is rows[2].measured is None and rows[1].measured['pro']['low'] is not None

def test_a_misspelt_system_is_said_before_any_fit(board, pool, monkeypatch, tmp_path):
    monkeypatch.setattr(dynad.systems, 'fitted', lambda *a, **k: pytest.fail('fitted something'))
    monkeypatch.setattr(dynad.findings, 'fitted', lambda *a, **k: pytest.fail('fitted something'))
    with pytest.raises(ConfigError, match="method = 'padm' is not known; did you mean 'padim'|padm"): check_methods(['padm'])
    for ask in (lambda: list(systems([board], ['patchcore', 'padm'])), lambda: by_class(Record('table1', tmp_path, PARAMETERS), [board], 'smoke', [0], methods=['padm'])):
        with pytest.raises(ConfigError, match="'padm'"): ask()

def test_systems_share_their_fits_and_measurements(board, pool, monkeypatch):
    first = measured_by(board, 'padim', n_boot=20)
    stages = lambda: sorted(str(p.relative_to(pool)) for p in (pool/'stages').glob('*/*') if p.is_dir())
    before = stages()
    monkeypatch.setattr(dynad.systems, 'measure', lambda *a, **k: pytest.fail('measured again'))
    again = measured_by(board, 'padim', n_boot=20)
    assert again['pro'] == first['pro'] and torch.equal(again['scores'], first['scores']) and stages() == before
    assert paired(again, first, 'pro', 20) == dict(difference=0, low=0, high=0)
    monkeypatch.undo()
    os.environ['DYNAD_POOL'] = str(pool)
    whole = measure(*fitted(board, method='padim'), n_boot=20)
    assert all(whole[k] == first[k] for k in ('i_auroc', 'p_auroc', 'pro')) and paired(whole, first, 'pro', 20)['difference'] == 0

def beside(record, board, run, metrics=('i_auroc', 'pro')):
    m, against = measure(*run, 20), Differences()
    enter(record, None, 'Ours', m, metrics, subject=board)
    enter_systems(record, board, ['patchcore', 'padim', 'uniad', 'broken'], 'smoke', m, metrics, 20, None, against, bar := Bar(4, 'systems'))
    for k in metrics: record.note(against.standing(record, k))
    assert repr(bar).startswith('systems: 4 of 4')
    return record

def test_computed_columns_beside_the_printed_ones(run, board, broken, tmp_path):
    r = beside(Record('table1', tmp_path, PARAMETERS), board, run)
    df = side_by_side(r, ('i_auroc', 'pro')).df
    here, on, paper = df['computed here'], df[df.columns[-1]], df['printed: VisA, average']
    assert (here.loc[['Ours', 'PatchCore', 'PaDiM']] != '—').all(axis=None) and (here.loc[['UniAD', 'broken (toy)', 'DRAEM']] == '—').all(axis=None)
    assert on[['Ours', 'PatchCore', 'PaDiM']].str.contains('synthetic board (stand-in); smoke preset', regex=False).all()
    assert on['broken (toy)'] == 'failed: ZeroDivisionError: as a bug would' and on['DRAEM'] == reason_of('DRAEM') and on['UniAD'].startswith('not run: ')
    assert paper.loc['PatchCore'].tolist() == ['95.1', '91.2'] and paper.loc['Ours'].tolist() == ['96.0', '94.1'] and paper.loc['UniAD'].tolist() == ['—', '—']
    assert set(long_comparison(r).df.paper) == {'—'} and long_comparison(r).df.data.str.contains('stand-in').all()
    saved = json.loads(r.save().read_text())
    assert set(saved['not_run']) == {'UniAD', 'broken (toy)'} and {'PatchCore', 'PaDiM'} <= {x['column'] for x in saved['rows']}

def test_the_opening_says_what_the_images_are(run, board, broken, tmp_path):
    r = beside(Record('table1', tmp_path, PARAMETERS), board, run)
    first, *rest = opening(r, ('i_auroc', 'pro'))
    assert 'synthetic board (stand-in); smoke preset' in first and 'nothing here supports or contradicts a printed number' in first and 'UniAD' in first
    assert sorted(rest) == sorted(r.notes) and all('synthetic board (stand-in)' in n for n in rest if 'points' in n)

def test_a_training_that_was_cut_short_says_so_in_its_line(run, board, pool, tmp_path):
    r = Record('table1', tmp_path, PARAMETERS)
    enter(r, None, 'Ours', m := measure(*run, 20), ('pro',), subject=board)
    enter_systems(r, board, ['simplenet', 'padim'], 'smoke', m, ('pro',), 20)
    on = (df := side_by_side(r, ('pro',)).df)[df.columns[-1]]
    assert on['SimpleNet'].endswith('; trained for 150 of its 600 steps') and 'steps' not in on['PaDiM']
    assert 'Not at full length: SimpleNet trained for 150 of its 600 steps' in opening(r, ('pro',))[0]
    assert shortened('simplenet', 'small') == '' and json.loads(r.save().read_text())['remarks'].keys() == {'SimpleNet'}

def test_long_tables_are_folded_and_whole(run, board, broken, tmp_path):
    r = beside(Record('table3', tmp_path, PARAMETERS), board, run)
    for t, n in ((printed_table(r), 17), (long_comparison(r), len(compared(r)))):
        html = t._repr_html_()
        assert html.startswith('<details><summary>') and html.count('<tr') >= n and '...' not in html and t.caption in repr(t)

def test_on_the_whole_category_the_printed_row_is_its_own(real, tmp_path):
    s = subjects('btad/01')[0]
    r = Record('table2', tmp_path, PARAMETERS | {'preset': 'paper'}).add(None, 'PatchCore', 'pro', .5, .4, .6, n=70, seed=0, subject=s)
    df = side_by_side(r, ('pro',)).df
    [value] = df.loc['PatchCore', 'printed: BTAD, class 01'].tolist()
    assert float(value) == compared(r)[0]['paper'] and not opening(r, ('pro',))[0].endswith('number.')

def test_what_the_intervals_settle_against_many():
    d = lambda v, low, high: dict(difference=v, low=low, high=high)
    a = Differences()
    a.found = {'pro': {'lower': [d(.1, .05, .2)], 'higher': [d(-.1, -.2, -.05)], 'near': [d(.01, -.1, .1)], 'twice': [d(.1, .05, .2), d(.1, -.05, .2)], 'bare': [d(.1, None, None)]}}
    assert a.groups('pro') == {'above': ['lower (+10.0 [+5.0, +20.0])'], 'below': ['higher (-10.0 [-20.0, -5.0])'],
                               'not settled against': ['near (+1.0 [-10.0, +10.0])', 'twice (+10.0)', 'bare (+10.0)']}

def test_a_baseline_stands_beside_the_null_models(run, board, tmp_path):
    for row, place in ((None, ('PatchCore', 'PatchCore')), ('', (board.label, 'PatchCore')), ('x', ('x', 'PatchCore'))):
        r = Record('table5', tmp_path, PARAMETERS)
        assert tuple(enter_nulls(r, *run, board, 20, ('pro',), row)) == NULLS
        [b] = [x for x in r.rows if x['column'] == 'PatchCore']
        assert (b['row'], b['column']) == place and not b['null'] and r.settings[b['settings']]['method'] == 'patchcore'
    assert not [x for x in r.rows if x['column'] == 'PatchCore' and x['null']]

# notebooks of nbs/papers, their cells run here with a detector that is trained in a second

def executed(name, monkeypatch, out, overrides=None, **given):
    "The names that the cells of a notebook leave behind."
    import nbformat
    from pathlib import Path
    monkeypatch.setattr(dynad.subjects, 'fitted', lambda s, preset, seed, more=None, **kw: fitted(s, 'smoke', seed, QUICK | (overrides or {}) | (more or {}), **kw))
    space = {}
    for c in nbformat.read(Path(__file__).parent.parent/'nbs'/'papers'/f'{name}.ipynb', 4).cells:
        if c.cell_type != 'code': continue
        exec(compile(c.source, name, 'exec'), space)
        if 'parameters' in c.metadata.get('tags', []): space |= dict(n_boot=0, out=str(out)) | given
    return space

def test_fig13_without_masks_and_without_intervals(pool, monkeypatch, tmp_path):
    monkeypatch.setattr(dynad.subjects, '_truth', lambda names, size, key: (torch.zeros(len(names), 1, size, size, dtype=torch.bool), torch.zeros(len(names), dtype=torch.bool)))
    space = executed('fig13', monkeypatch, tmp_path, data='synthetic:board', omegas=[0, 1])
    assert list(space['defined']) == ['i_auroc'] and [n for n in space['record'].notes if 'as the paper reports: not judged without an interval' in n]
    assert all(r['settings'] for r in space['record'].rows) and len(space['curves']) == 2
    assert not [k for c in (*space['curves'].values(), *space['nulls'].values()) for k in ('maps', 'masks', 'pixels') if c.get(k) is not None]

def test_fig13_says_what_the_intervals_settle(pool, monkeypatch, tmp_path):
    space = executed('fig13', monkeypatch, tmp_path, data='synthetic:board', omegas=[0, 1], n_boot=20)
    assert len(space['record'].notes) == 3
    for n, k in zip(space['record'].notes, ('i_auroc', 'p_auroc', 'pro')):
        d = paired(space['ends']['synthetic_board', 0, 0], space['ends']['synthetic_board', 0, 1], k, 20)
        assert ('not settled' in n) == (d['low'] <= 0 <= d['high']) and (': holds' in n) == (d['low'] > 0)

def test_scale_where_all_images_get_one_t_hat(pool, monkeypatch, tmp_path):
    space = executed('scale', monkeypatch, tmp_path, {'reconstruction.severity': 'static'}, data='synthetic:board', n_boot=20)
    assert any('T̂ rises with area' in n and 'not defined, DIC gives all anomalous images T̂ = 160' in n for n in space['record'].notes)
    assert all(r['settings'] for r in space['record'].rows)

def test_fig14_keeps_whole_images_of_those_shown_only(pool, monkeypatch, tmp_path):
    space = executed('fig14', monkeypatch, tmp_path, data='synthetic:board', levels=[80], images=2)
    assert len(space['runs']) == 2 and len(space['shown']['synthetic_board']['rows']) == 2
    for r in (*space['runs'].values(), *space['shown'].values()): assert all(len(v) == 2 for k, v in r.items() if isinstance(v, torch.Tensor) and k != 'abar')
    assert all(r['settings'] for r in space['record'].rows)
