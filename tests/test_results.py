"What 21_results says of the ablations: its words, its figures and the records in nbs/results/ablations agree."
import json, re
from pathlib import Path

import nbformat
import pytest

from dynad.findings import leads, read_results, results_table

NBS = Path(__file__).parent.parent/'nbs'
RECORDS = sorted((NBS/'results'/'ablations').glob('*.json'))

def read(name): return json.loads((NBS/'results'/'ablations'/f'{name}.json').read_text(encoding='utf-8'))

def value(lines, row, column, metric, key='ours'):
    [l] = [l for l in lines if (l['row'], l['column'], l['metric']) == (row, column, metric)]
    return l[key]

@pytest.mark.parametrize('name', ['spaces-cookies', 'spaces-magnetic_tile'])
def test_sentences_on_spaces_follow_from_the_intervals(name):
    "Each comparison of the spaces is judged by its interval, and says where an arm is below its own untrained denoiser."
    r = read(name)
    lines, seeds = r['comparison'], len(r['parameters']['seeds'])
    said = [re.fullmatch(r'Latents, tiny above pixels, (.*), (I-AUROC|P-AUROC|PRO): (.*?)(, although .*)?; on .*', n) for n in r['notes'] if ' above pixels' in n]
    assert len(said) == 9 and all(said)
    for what, metric, found, although in (m.groups() for m in said):
        get = lambda column, *keys: [value(lines, what, column, f'Δ {metric}, points', k) for k in keys]
        lead, low, high = get('latents, tiny − pixels', 'ours', 'low', 'high')
        if seeds == 1:
            assert found == f"{'holds' if low > 0 else 'does not hold, the reverse does' if high < 0 else 'not settled, the interval holds 0'} ({lead:+.1f} points [{low:+.1f}, {high:+.1f}])"
        else: assert sum(map(int, re.fullmatch(r'holds in (\d), the reverse in (\d), not settled in (\d) of 3 runs .*', found).groups())) == seeds and f'(mean {lead:+.1f} points)' in found
        assert bool(although) == any(min(v for v in get(f'{arm} − its untrained denoiser', 'ours', 'least') if v is not None) < 0 for arm in ('latents, tiny', 'pixels')), (what, metric)

@pytest.mark.parametrize('name', ['spaces-cookies', 'spaces-magnetic_tile'])
def test_both_spaces_have_as_much_to_learn_with(name):
    "The comparison is one of capacity: as many weights within a twentieth, and a pixel denoiser that has learnt to name the noise."
    found = [re.match(r'(Latents, tiny|Pixels): ([\d.]+) million weights saw ([\d,]+) images down to an ε-loss of ([\d.]+);', n) for n in read(name)['notes']]
    (latents, pixels) = [[float(v.replace(',', '')) for v in m.groups()[1:]] for m in found if m]
    assert abs(latents[0]/pixels[0] - 1) < .05 and pixels[2] < .1

def test_the_figures_in_the_text_are_those_of_the_records():
    c, m = (read(f'spaces-{n}') for n in ('cookies', 'magnetic_tile'))
    shown = [o['data'].get('text/markdown', '') for x in nbformat.read(NBS/'21_results.ipynb', 4).cells for o in x.get('outputs', ()) if 'data' in o]
    [text] = [t for t in shown if 'localise better than pixels' in t]
    points = lambda r, what, k: value(r['comparison'], what, 'latents, tiny − pixels', f'Δ {k}, points')
    of = lambda space, k, column='Ours', key='ours': f"{value(c['comparison'], space, column, k, key):.1f}"
    change = lambda r, space: f"{value(r['comparison'], f'{space}: largest quarter of the defects', 'Ours', 'change inside ÷ outside the defects'):.2f}"
    best = 'all defects, oracle settings'
    assert f"latents lead by {points(m, 'all defects', 'I-AUROC'):.1f} points of I-AUROC and {points(m, 'all defects', 'PRO'):.1f} of PRO" in text
    assert f"lead by {points(c, 'all defects', 'PRO'):.1f} points of PRO" in text and f"by {points(c, best, 'PRO'):.1f} where" in text
    assert f"{-points(c, 'all defects', 'I-AUROC'):.1f} and {-points(c, best, 'I-AUROC'):.1f} points behind, settled in one and in none" in text
    i_auroc = [n for n in c['notes'] if re.match(r'Latents, tiny above pixels, all defects(, oracle settings)?, I-AUROC', n)]
    assert ['holds in 0, the reverse in 1, not settled in 2' in i_auroc[0], 'holds in 0, the reverse in 0, not settled in 3' in i_auroc[1]] == [True, True]
    assert f"changes {change(c, 'pixels')} times as much as outside in pixels and {change(c, 'latents, tiny')} times in latents; on magnetic tile {change(m, 'pixels')} and {change(m, 'latents, tiny')} times" in text
    assert f"I-AUROC {of('pixels', 'i_auroc')} against {of('pixels', 'i_auroc', 'untrained denoiser')}" in text and f"PRO {of('pixels', 'pro')} against {of('pixels', 'pro', 'untrained denoiser')}" in text
    assert f"its PRO of {of('pixels', 'pro', key='oracle')} is within a point" in text and abs(value(c['comparison'], best, 'pixels − its untrained denoiser', 'Δ PRO, points')) < 1
    assert all(value(m['comparison'], 'all defects', f'{a} − its untrained denoiser', f'Δ {k}, points', 'low') > 0 for a in ('latents, tiny', 'pixels') for k in ('I-AUROC', 'P-AUROC', 'PRO'))

@pytest.mark.parametrize('path', RECORDS, ids=lambda p: p.stem)
def test_kept_records_have_intervals(path):
    "Means over seeds too, with the range over seeds beside them."
    r = json.loads(path.read_text(encoding='utf-8'))
    lines = [l for l in r['comparison'] if l['metric'] in ('i_auroc', 'p_auroc', 'pro') and l['ours'] is not None]
    assert lines and all(l['low'] <= l['ours'] + .5 and l['high'] >= l['ours'] - .5 for l in lines) # percentile intervals may leave their value out by a little
    assert all((l['least'] is not None) == (len(l['seeds']) > 1) for l in lines)

def test_sentences_are_split_at_their_verdicts():
    "A claim may hold a colon, and what follows the verdict belongs to it."
    [source] = [c.source for c in nbformat.read(NBS/'21_results.ipynb', 4).cells if 'def sentences' in c.source]
    exec(source[source.index('def sentences'):source.index('directions =')], space := {'re': re})
    for claim, found in (('DS, with DA: better with than without, PRO', 'holds (+1.0 points [+0.2, +1.8])'), ('a above b, PRO', 'holds in 2, the reverse in 0, not settled in 1 of 3 runs (mean +1.0 points), although in 1 of them the pixel denoiser is worse than random weights there (35.1 against 72.0)')):
        assert list(space['sentences']({'notes': [f'{claim}: {found}; on cookies (stand-in); small preset; seed 0.']})) == [(claim, found, 'cookies (stand-in); small preset; seed 0')]
    assert list(space['sentences']({'notes': ['A remark.']})) == [('A remark.', '', '')]

# results over seeds

def result(seed, value, **baseline):
    metric = lambda v: dict(value=v, low=v - .02, high=v + .02)
    return dict(pro=metric(value), i_auroc=metric(value), protocol=dict(seed=seed, image_level_only=7, test_defective=61, masks_lost_to_resizing=3),
                settings=dict(data=dict(image_size=128)), versions=dict(dynad='0.2.0'), baseline={k: dict(pro=metric(v)) for k, v in baseline.items()})

def test_seeds_of_a_set_become_one_table(tmp_path):
    "Whatever files there are: a row says how many seeds it has, and a file of another name is left alone."
    for seed, value, other in ((0, .8, {}), (2, .9, dict(patchcore=.7)), (10, 1., dict(patchcore=.9))):
        (tmp_path/f'my_set_seed{seed}.json').write_text(json.dumps(result(seed, value, **other)), encoding='utf-8')
    (tmp_path/'one_seed0.json').write_text(json.dumps(result(0, .5)), encoding='utf-8')
    (tmp_path/'my_set.json').write_text('no result')
    found = read_results(tmp_path)
    assert {n: [r['protocol']['seed'] for r in rs] for n, rs in found.items()} == {'my_set': [0, 2, 10], 'one': [0]}
    t = results_table(found['my_set'], ('i_auroc', 'pro'))
    assert t.index.name == '3 of 57 masks vanish at 128²; 4 of 61 anomalous images have no mask'
    assert t.loc['DynAD'].tolist() == ['0.900 ± 0.100', '0.900 ± 0.100', '3 (0, 2, 10)', '0.2.0']
    assert t.loc['baseline: patchcore'].tolist() == ['—', '0.800 ± 0.141', '2 (2, 10)', '0.2.0']
    assert results_table(found['one'], ('pro',)).loc['DynAD', 'PRO'] == '0.500 [0.480, 0.520]'

def test_who_leads_is_said_of_the_seeds_that_both_have():
    rs = [result(0, .1), result(2, .9, other=.7), result(3, 1., other=.9)]
    assert leads(rs, 'DynAD', 'baseline: other') == 'DynAD and other: PRO higher with DynAD (0.950 against 0.800).'
    assert leads([result(0, .8, other=.8)], 'DynAD', 'baseline: other') == 'DynAD and other: PRO equal (0.800).'
    assert leads(rs[:1], 'DynAD', 'baseline: other') == ''
