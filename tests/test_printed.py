"The paper's printed numbers: complete, plausible, and consistent but for the two known slips."
import math, subprocess, sys
from pathlib import Path

import pytest

from dynad.download import PUBLISHED
from dynad.experiments import METRICS, SETS, TABLE_SET, plain_name, printed

CELLS = {'table1': 13*6*2, 'table2': 4*6*2, 'table3': 3 + 2 + 3 + 1 + 3 + 3, 'table4': 2*3, 'table5': 5*3, 'table6': 4*3, 'table7': 16*(3 + 2 + 3 + 1 + 3 + 3), 'table8': 6, 'table9': 4*2}

def test_every_number_is_there_once():
    df = printed()
    assert df.groupby('table').size().to_dict() == CELLS
    assert not df.duplicated(['table', 'row', 'column', 'metric']).any() and not df.isna().any().any()
    assert set(df.metric) <= set(METRICS) and set(df.table) == set(TABLE_SET)
    share = df[~df.metric.isin(['fps', 'seconds'])]
    assert share.value.between(10, 100).all() and (share.value*10 % 1).map(lambda r: min(r, 1 - r)).max() < 1e-6 # one decimal

def test_rows_are_the_categories_of_the_sets():
    for table, name in (('table1', 'visa'), ('table2', 'btad'), ('table7', 'mvtec')):
        rows = {SETS[name].rows.get(c, c) for c in SETS[name].categories}
        assert set(printed(table).row) - {'average'} == rows
        assert set(SETS[name].categories) == set(PUBLISHED[name])

def off(value, exact): # printed with one decimal: at most half a unit away
    return abs(value - exact) > .05 + 1e-9

def test_averages_follow_from_rows_but_for_one():
    wrong = []
    for table in ('table1', 'table2', 'table7'):
        for (column, metric), part in printed(table).groupby(['column', 'metric']):
            rows, mean = part[part.row != 'average'].value, part[part.row == 'average'].value.item()
            if off(mean, math.fsum(rows)/len(rows)): wrong.append((table, column, metric, round(math.fsum(rows)/len(rows), 2), mean))
    assert wrong == [('table7', 'Ours', 'pro', 93.25, 93.3)]

def value(table, row, column, metric):
    df = printed(table)
    return df[(df.row.map(plain_name) == row) & (df.column == column) & (df.metric == metric)].value.item()

def test_tables_agree_with_each_other():
    for r in printed('table3').itertuples(): assert value('table7', 'average', r.column, r.metric) == r.value
    ours = {m: value('table4', 'average', 'Ours', m) for m in ('i_auroc', 'p_auroc', 'pro')}
    for m, v in ours.items(): assert value('table5', 'dic', 'Ours', m) == value('table6', 'ds+da', 'Ours', m) == v
    assert value('table1', 'average', 'Ours', 'i_auroc') == ours['i_auroc'] and value('table1', 'average', 'Ours', 'pro') == ours['pro'] and value('table8', 'average', 'Ours', 'p_auroc') == ours['p_auroc']

def best_other(table, metric, only=None):
    df = printed(table)
    return df[(df.row == 'average') & (df.metric == metric) & (df.column != 'Ours') & (df.column.isin(only) if only else True)].value.max()

CLAIMS = { # of Section 5: what the text says, what its tables give
    'Table 1, PRO over the next method': (2.7, lambda: value('table1', 'average', 'Ours', 'pro') - best_other('table1', 'pro')),
    'Table 2, PRO over the next method': (5.9, lambda: value('table2', 'average', 'Ours', 'pro') - best_other('table2', 'pro')),
    'Table 3, P-AUROC over DRAEM': (.1, lambda: value('table3', 'average', 'Ours', 'p_auroc') - value('table3', 'average', 'DRAEM', 'p_auroc')),
    'Table 3, PRO over DRAEM': (.3, lambda: value('table3', 'average', 'Ours', 'pro') - value('table3', 'average', 'DRAEM', 'pro')),
    'Table 3, I-AUROC behind DRAEM': (.8, lambda: value('table3', 'average', 'DRAEM', 'i_auroc') - value('table3', 'average', 'Ours', 'i_auroc')),
    'Table 5, I-AUROC over 80 steps': (.6, lambda: value('table5', 'dic', 'Ours', 'i_auroc') - value('table5', '100%', 'Ours', 'i_auroc')),
    'Table 5, P-AUROC over 80 steps': (1.2, lambda: value('table5', 'dic', 'Ours', 'p_auroc') - value('table5', '100%', 'Ours', 'p_auroc')),
    'Table 5, PRO of 20 steps over DIC': (.2, lambda: value('table5', '25%', 'Ours', 'pro') - value('table5', 'dic', 'Ours', 'pro'))}

def test_the_text_agrees_with_the_tables_but_for_one():
    wrong = {name: (said, round(given(), 1)) for name, (said, given) in CLAIMS.items() if abs(said - given()) > 1e-6}
    assert wrong == {'Table 1, PRO over the next method': (2.7, 2.9)}

def test_seconds_and_frames_belong_together():
    for column in set(printed('table9').column): assert abs(1/value('table9', 'average', column, 'seconds') - value('table9', 'average', column, 'fps')) < .06

def test_unknown_table():
    with pytest.raises(ValueError, match="table = 'table10' does not exist; allowed: table1, table2"): printed('table10')

def test_classes_that_the_paper_counts_as_its_own():
    "Section 5: best in 8 of 12 classes by PRO and in 3 by I-AUROC (ties count)."
    t = printed('table1').query("row != 'average'")
    won = {m: sum(g.loc[g.column == 'Ours', 'value'].item() >= g.value.max() for _, g in t[t.metric == m].groupby('row')) for m in ('pro', 'i_auroc')}
    assert won == {'pro': 8, 'i_auroc': 3}

def test_the_package_carries_the_file(tmp_path):
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '-d', str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'dynad'/'printed.csv').read_bytes() == (root/'dynad'/'printed.csv').read_bytes()
