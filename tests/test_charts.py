"Notebook 02b: charts as SVG, templates and HTML fragments."
import re
from importlib.resources import files
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from jinja2 import UndefinedError
from markupsafe import escape

from dynad.charts import (BASE, LEFT, TOP, WIDTH, Svg, bar_chart, color_bar, css, error_html, extend_edges, histogram, nice_top, render,
                          score_chart, t_hat_chart, template_text, text_span)

def drawn(svg):
    "Bars (x, y, w, h, kind, name, value), texts and dashed lines of a chart, from the SVG itself."
    root = ElementTree.fromstring(svg)
    bars = [dict({k: float(r.get(k)) for k in ('x', 'y', 'width', 'height')}, kind=r.get('class'),
                 **dict(zip(('name', 'value'), r[0].text.rsplit(': ', 1)))) for r in root.iter('rect') if len(r)]
    texts = [(float(t.get('x')), float(t.get('y')), t.text) for t in root.iter('text')]
    return bars, texts, [float(l.get('x1')) for l in root.iter('line') if l.get('class') == 'mark']

def axis_top(svg):
    "The highest number of the vertical axis and its height in units."
    y, text = min((y, t) for x, y, t in drawn(svg)[1] if x == LEFT - 5)
    return float(text.rstrip('%'))/(100 if '%' in text else 1), BASE - (y - 4)

# bars

def test_bars_are_as_high_as_their_values():
    bars, *_ = drawn(bar_chart({'a': [1, 2], 'b': [0, 4]}, np.array([0, .5, 1]), ('train', 'test')))
    high = {(b['name'], b['value']): b['height'] for b in bars}
    assert high['a', '2'] == pytest.approx(2*high['a', '1'], abs=.02) and high['b', '4'] == pytest.approx(4*high['a', '1'], abs=.03)
    assert len(bars) == 3, "an empty slot has no bar"

def test_a_stack_stands_on_itself():
    (a, b), *_ = drawn(bar_chart({'a': [3], 'b': [1]}, np.array([0, 1]), ('normal', 'anomalous'), layout='stack'))
    assert b['y'] + b['height'] == pytest.approx(a['y'], abs=.02)

def test_bars_beside_each_other_do_not_overlap():
    bars, *_ = drawn(bar_chart({'a': [3, 1], 'b': [1, 2]}, np.array([0, .5, 1]), ('normal', 'anomalous'), layout='beside', gap=.2))
    ends = sorted((b['x'], b['x'] + b['width']) for b in bars)
    assert all(right <= left for (_, right), (left, _) in zip(ends, ends[1:]))

def test_names_are_escaped_and_a_kind_sets_the_colour():
    svg = bar_chart({'<a> & "b"': [1]}, np.array([0, 1]), ('anomalous',))
    bars, texts, _ = drawn(svg)
    assert '<a>' not in svg and bars[0]['name'] == '<a> & "b"' == texts[-1][2] and bars[0]['kind'] == 'anomalous' and '#D55E00' in svg

@given(st.one_of(st.tuples(st.floats(1e-6, 1), st.just(False)), st.tuples(st.integers(1, 10**6), st.just(True))))
@settings(deadline=None)
def test_the_axis_ends_at_a_round_number_not_far_above(case):
    v, counts = case
    top = nice_top(v, counts)
    assert v*(1 - 1e-6) <= top <= 2.1*v and (not counts or top % 2 == 0)

# the histogram

@settings(deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=30), st.integers(1, 12))
def test_extended_edges_keep_the_training_bins(values, n):
    edges = np.linspace(0., 3., n + 1)
    out = extend_edges(edges, min(values), max(values), most=10**6)
    assert (np.diff(out) > 0).all() and out[0] <= min([*values, 0]) + 1e-6 and out[-1] >= max([*values, 3]) - 1e-6
    assert all(np.isclose(out, e).any() for e in edges)

def test_histogram_counts_values_beyond_the_edges():
    svg = histogram([.5, 1.5, 1.5, 2.5], [2.5, 9.5], [0., 1, 2, 3], place=1e9)
    bars, texts, marks = drawn(svg)
    top, height = axis_top(svg)
    shares = {k: [b['height']/height*top for b in bars if b['kind'] == k] for k in ('train', 'test')}
    assert shares['train'] == pytest.approx([.25, .5, .25], abs=.01) and sum(shares['test']) == pytest.approx(1, abs=.01)
    assert len(marks) == 1 and marks[0] <= WIDTH and [t for _, _, t in texts if t == 'this image'] == ['this image']
    assert [t for _, y, t in drawn(histogram([.5], [2.5], [0., 1, 2, 3]))[1] if y == 12] == ['1', '2', '3']

def test_no_image_is_lost_from_a_chart():
    "Values outside the training range have slots of their own."
    g = torch.Generator().manual_seed(0)
    train, test = torch.rand(40, generator=g) + 1, torch.rand(60, generator=g)*4
    svg = histogram(train, test, torch.linspace(float(train.min()), float(train.max()), 11))
    top, height = axis_top(svg)
    for kind in ('train', 'test'):
        assert sum(b['height'] for b in drawn(svg)[0] if b['kind'] == kind)/height*top == pytest.approx(1, abs=.02)
    labels, count = torch.tensor([0, 1]*30), lambda svg: sum(float(b['value']) for b in drawn(svg)[0])
    assert count(score_chart(test, labels, 1.)) == count(t_hat_chart(torch.tensor([20, 40, 60]*20), labels)) == 60

@pytest.mark.parametrize('train, test, edges, text', [
    ([1.], [2.], [1.], 'at least two increasing'), ([1.], [2.], [1., 1.], 'at least two increasing'), ([1.], [2.], [1., 1., 2.], 'at least two increasing'),
    ([1.], [2.], [0., float('nan')], 'at least two increasing'),
    ([float('nan'), 1], [2.], [0., 1], '1 of 2 training values are NaN'), ([1.], [float('inf')], [0., 1], '1 of 1 test values')])
def test_histogram_errors(train, test, edges, text):
    with pytest.raises(ValueError, match=text): histogram(train, test, edges)

def test_histogram_of_training_alone_of_nothing_or_of_equal_distances_is_drawn():
    assert len(drawn(histogram(torch.rand(9), None, torch.linspace(0, 1, 11)))[0]) and len(drawn(histogram([.5], [], [0., 1.]))[0]) == 1
    assert len(drawn(histogram(torch.ones(5), torch.ones(3), torch.ones(11)))[0]) == 2

@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=30), st.lists(st.floats(0, 1e9), max_size=30), st.floats(0, 1e9))
@settings(deadline=None, max_examples=50)
def test_everything_stays_inside_the_chart(train, test, place):
    bars, texts, marks = drawn(histogram(train, test, np.linspace(min(train), max(train) + 1, 6), place))
    assert all(LEFT <= b['x'] and b['x'] + b['width'] <= WIDTH and TOP - .01 <= b['y'] and b['y'] + b['height'] <= BASE + .01 for b in bars)
    assert LEFT <= marks[0] <= WIDTH and all(0 <= x <= WIDTH for x, *_ in texts)

@pytest.mark.parametrize('scores', [[1.]*4, [0., 0, 0, 5], [1e-3, 1, 10, 1000]])
def test_score_chart_of_odd_scores(scores):
    svg = score_chart(torch.tensor(scores), torch.tensor([0, 0, 1, 1]), .5)
    bars, texts, marks = drawn(svg)
    assert sum(float(b['value']) for b in bars) == 4 and all(np.isfinite([b['x'], b['y']]).all() and b['width'] > 0 for b in bars)
    assert LEFT <= marks[0] <= WIDTH and ('score, logarithmic' in svg) == (scores[-1] == 1000)

def test_a_chart_displays_in_a_notebook_and_passes_through_a_template():
    svg = histogram([1.], [2.], [0., 1.])
    assert isinstance(svg, Svg) and escape(svg) == svg and svg._repr_svg_().startswith('<svg xmlns=') and 'http' not in svg
    ElementTree.fromstring(svg._repr_svg_())

# templates and fragments

def test_templates_escape_and_miss_nothing():
    assert '<title>&lt;x&gt;</title>' in render('page.html', title='<x>', style='')
    with pytest.raises(UndefinedError, match="'title' is undefined"): render('page.html', style='')

def test_the_theme_comes_first_and_stays_below_its_class():
    assert css('widgets.css').startswith(template_text('theme.css')[:100])
    text = re.sub(r'/\*.*?\*/', '', css('widgets.css'), flags=re.S)
    for selector in re.findall(r'([^{}]+)\{', text):
        assert all(s.strip().startswith('.dynad-') for s in selector.split(',')), f"{selector.strip()} would change JupyterLab itself"

def test_every_style_sheet_is_balanced_and_asks_nothing_of_a_server():
    for f in (files('dynad')/'templates').iterdir():
        text = f.read_text(encoding='utf-8')
        asked = text.replace('http://www.w3.org/2000/svg', '').replace('url(${urls.get(', '') # a namespace; pictures in memory
        assert not re.search(r'https?:|@import|url\(|<script|<link', asked), f.name
        if f.name.endswith('.css'): assert text.count('{') == text.count('}'), f.name

def test_templates_are_in_the_built_package():
    "setup.py names them; a wheel without them would have no results page."
    from pathlib import Path
    text = (Path(__file__).parent.parent/'setup.py').read_text()
    assert '"templates/*"' in text and {'theme.css', 'report.html', 'chart.html'} <= {f.name for f in (files('dynad')/'templates').iterdir()}

def test_fragments_are_escaped():
    assert error_html('') == '' and '&lt;x&gt;' in error_html('<x>')
    assert 'linear-gradient' in color_bar(2, 'unit') and '>2<' in color_bar(2, 'unit')

# labels

finite = st.floats(1e-4, 1e6)

@settings(max_examples=40, deadline=None)
@given(st.lists(finite, min_size=2, max_size=30, unique=True), st.lists(finite, min_size=1, max_size=30), st.integers(1, 30), st.booleans())
def test_no_label_of_a_distance_chart_covers_another(train, test, bins, unequal):
    "Whatever the numbers, the bins and how far the test images lie beyond them."
    train = np.array(train)
    edges = np.unique(np.quantile(train, np.linspace(0, 1, bins + 1))) if unequal else np.linspace(train.min(), train.max(), bins + 1)
    if len(edges) < 2 or (np.diff(edges) <= 0).any(): return
    texts = drawn(histogram(train, np.array(test), edges))[1]
    for y in (BASE + 15, 12):
        row = [text_span(x, t) for x, at, t in texts if at == y]
        assert row and all(a[1] < b[0] for a, b in zip(row, row[1:])), texts
