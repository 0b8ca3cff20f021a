"What 20_results says of the ablations: its words, its figures and the records in nbs/results/ablations agree."
import json, re
from pathlib import Path

import nbformat
import pytest

NBS = Path(__file__).parent.parent/'nbs'
RECORDS = sorted((NBS/'results'/'ablations').glob('*.json'))

def read(name): return json.loads((NBS/'results'/'ablations'/f'{name}.json').read_text(encoding='utf-8'))

def value(lines, row, column, metric, key='ours'):
    [l] = [l for l in lines if (l['row'], l['column'], l['metric']) == (row, column, metric)]
    return l[key]

def test_no_space_wins_against_one_that_training_made_worse():
    "A difference of spaces counts only where each arm is above its own untrained denoiser."
    r = read('spaces')
    lines, names = r['comparison'], {'I-AUROC': 'i_auroc', 'P-AUROC': 'p_auroc', 'PRO': 'pro'}
    said = [re.fullmatch(r'Latents, tiny above pixels, (.*), (.*?): (.*); on .*', n) for n in r['notes'] if ' above pixels' in n]
    assert len(said) == 9 and all(said)
    for m in said:
        metric = f'Δ {m[2]}, points'
        behind = [arm for arm in ('latents, tiny', 'pixels') if value(lines, m[1], f'{arm} − its untrained denoiser', metric) < 0]
        assert bool(behind) == m[3].startswith('not comparable: the pixel denoiser is not trained far enough'), m[0]
        assert (m[3].startswith('holds')) <= (value(lines, m[1], 'latents, tiny − pixels', metric, 'low') > 0)
    for name, k in names.items(): # fixed settings: the rows and the difference of the two are the same numbers
        assert value(lines, 'pixels', 'Ours', k) - value(lines, 'pixels', 'untrained denoiser', k) == pytest.approx(value(lines, 'all defects', 'pixels − its untrained denoiser', f'Δ {name}, points'), abs=.05)

def test_the_figures_in_the_text_are_those_of_the_record():
    lines = read('spaces')['comparison']
    [text] = [c.source for c in nbformat.read(NBS/'20_results.ipynb', 4).cells if c.cell_type == 'markdown' and 'above pixel space' in c.source]
    pixels = lambda k, key='ours', column='Ours': f"{value(lines, 'pixels', column, k, key):.1f}"
    lead = lambda k, what: f"{value(lines, what, 'latents, tiny − pixels', f'Δ {k}, points'):.1f}"
    random = f"{value(lines, 'pixels', 'Ours', 'pro', 'oracle') - value(lines, 'all defects, oracle settings', 'pixels − its untrained denoiser', 'Δ PRO, points'):.1f}"
    assert f"I-AUROC {pixels('i_auroc')} against {pixels('i_auroc', column='untrained denoiser')}, PRO {pixels('pro')} against {pixels('pro', column='untrained denoiser')}" in text
    assert f"{lead('I-AUROC', 'all defects')} and {lead('PRO', 'all defects')} points" in text and f"they reach {pixels('i_auroc', 'oracle')} and {pixels('pro', 'oracle')}" in text
    assert f"lead by {lead('I-AUROC', 'all defects, oracle settings')} points of I-AUROC" in text and f"by {lead('PRO', 'all defects, oracle settings')} points of PRO" in text and f'random weights ({random})' in text

@pytest.mark.parametrize('path', RECORDS, ids=lambda p: p.stem)
def test_kept_records_have_intervals(path):
    "Means over seeds too, with the range over seeds beside them."
    r = json.loads(path.read_text(encoding='utf-8'))
    lines = [l for l in r['comparison'] if l['metric'] in ('i_auroc', 'p_auroc', 'pro') and l['ours'] is not None]
    assert lines and all(l['low'] <= l['ours'] + .5 and l['high'] >= l['ours'] - .5 for l in lines) # percentile intervals may leave their value out by a little
    assert all((l['least'] is not None) == (len(l['seeds']) > 1) for l in lines)

def test_sentences_are_split_at_their_verdicts():
    "A claim may hold a colon, and so may the reason of 'not comparable'."
    [source] = [c.source for c in nbformat.read(NBS/'20_results.ipynb', 4).cells if 'def sentences' in c.source]
    exec(source[source.index('def sentences'):source.index('directions =')], space := {'re': re})
    for claim, found in (('DS, with DA: better with than without, PRO', 'holds (+1.0 points [+0.2, +1.8])'), ('a above b, PRO', 'not comparable: the pixel denoiser is not trained far enough (PRO 35.1, with random weights 72.0)')):
        assert list(space['sentences']({'notes': [f'{claim}: {found}; on cookies (stand-in); small preset; seed 0.']})) == [(claim, found, 'cookies (stand-in); small preset; seed 0')]
    assert list(space['sentences']({'notes': ['A remark.']})) == [('A remark.', '', '')]
