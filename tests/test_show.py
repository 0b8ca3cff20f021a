"Notebook 02: images, overlays, grids, curves and PNG."
import io, threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib import pyplot as plt
from PIL import Image

from dynad.show import (MARKED, PREDICTED, TRUTH, Figure, SmallImage, colorize, curve, drawing_lock, figure_png, grid, mask_border,
                        marked, overlay, palette_png, panel, save_png, smoothed, to_uint8)


def pixels(fig, **kw):
    return np.asarray(Image.open(io.BytesIO(figure_png(fig, **kw))).convert('RGB'))

# ---- to_uint8, save_png

@settings(deadline=None)
@given(arrays(np.uint8, (3, 4, 5)))
def test_bytes_survive_the_way_through_floats(a):
    x = torch.from_numpy(a)
    assert (to_uint8(x) == a.transpose(1, 2, 0)).all()
    assert (to_uint8(x.float()/255) == to_uint8(x)).all()

@pytest.mark.parametrize('x, value', [(torch.ones(4, 5, dtype=torch.bool), 255), (torch.full((1, 4, 5), .5), 128), (np.full((4, 5), 7, np.uint8), 7),
                                      (torch.full((3, 4, 5), 3.), 255), (torch.full((3, 4, 5), -1.), 0)])
def test_every_kind_of_image_becomes_rgb(x, value):
    out = to_uint8(x)
    assert out.shape == (4, 5, 3) and out.dtype == np.uint8 and (out == value).all()

def test_a_batch_or_a_nan_is_told():
    with pytest.raises(ValueError, match=r'got \[2, 3, 4, 4\]; take one of a batch'): to_uint8(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match='2 of 48 values are NaN or infinite'):
        x = torch.zeros(3, 4, 4); x[0, 0, 0] = float('nan'); x[1, 1, 1] = float('inf')
        to_uint8(x)

def test_saved_png_reads_back_and_leaves_nothing_beside_it(tmp_path):
    x = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    p = save_png(x, tmp_path/'new'/'x.png')
    assert (np.asarray(Image.open(p)) == to_uint8(x)).all() and [f.name for f in p.parent.iterdir()] == ['x.png']

def test_a_failed_save_keeps_the_old_file(tmp_path):
    p = save_png(torch.zeros(1, 2, 2), tmp_path/'x.png')
    before = p.read_bytes()
    with pytest.raises(ValueError): save_png(torch.full((1, 2, 2), float('nan')), p)
    assert p.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

# ---- colorize

def test_colorize_scales_between_its_ends():
    ends = colorize(torch.tensor([[0., 5., 10., 20., -3.]]), 0, 10, 'gray')[0, 0]
    assert ends[0] == 0 and abs(ends[1] - .5) < .01 and ends[2] == ends[3] == 1 and ends[4] == 0

def test_viridis_grows_in_lightness():
    c = colorize(torch.linspace(0, 1, 64)[None])[:, 0]
    light = torch.tensor([.2126, .7152, .0722])@c
    assert (light.diff() > 0).all()

def test_nan_is_grey_in_a_map():
    out = colorize(torch.tensor([[float('nan'), 0., float('inf')]]))
    assert torch.equal(out[:, 0, 0], torch.full((3,), .5)) and torch.equal(out[:, 0, 2], torch.full((3,), .5)) and not torch.equal(out[:, 0, 1], out[:, 0, 0])

def test_colorize_errors():
    with pytest.raises(ValueError, match="cmap = 'jett' does not exist"): colorize(torch.zeros(2, 2), cmap='jett')
    with pytest.raises(ValueError, match='vmax = 0 must be above vmin = 0'): colorize(torch.zeros(2, 2), 0, 0)
    with pytest.raises(ValueError, match=r'got \[3, 2, 2\]'): colorize(torch.zeros(3, 2, 2))

# ---- overlay

@settings(max_examples=25, deadline=None)
@given(arrays(bool, (12, 10)))
def test_contours_stay_on_their_side(a):
    m = torch.from_numpy(a)[None]
    image = torch.zeros(3, 12, 10)
    inner, outer = overlay(image, mask=m) > 0, overlay(image, truth=m) > 0
    assert not (inner.any(0) & ~m[0]).any() and not (outer.any(0) & m[0]).any()
    assert torch.equal(overlay(image, mask=torch.zeros_like(m), truth=torch.zeros_like(m)), image)

def test_contour_colours_differ_and_both_show():
    m = torch.zeros(1, 32, 32, dtype=torch.bool); m[:, 8:20, 8:20] = True
    out = overlay(torch.zeros(3, 32, 32), mask=m, truth=m)
    assert torch.allclose(out[:, 8, 12], torch.tensor(PREDICTED)) and torch.allclose(out[:, 7, 12], torch.tensor(TRUTH), atol=1e-6)
    assert (out[:, 14, 14] == 0).all()

def test_heat_is_clear_at_zero_and_opaque_at_one():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    cold, hot = overlay(image, torch.zeros(1, 8, 8)), overlay(image, torch.ones(8, 8))
    assert torch.allclose(cold[0], cold[2]) and (hot.flatten(1).std(1) < .2*image.flatten(1).std(1)).all()
    assert torch.equal(overlay(image, torch.full((1, 8, 8), float('nan'))), cold)
    assert torch.allclose(overlay(image), image, atol=.5/255 + 1e-6)

def test_overlay_of_another_size_is_told():
    with pytest.raises(ValueError, match=r'the map is \[1, 4, 4\] and the image \[3, 8, 8\]'): overlay(torch.zeros(3, 8, 8), torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match='the truth is'): overlay(torch.zeros(3, 8, 8), truth=torch.zeros(1, 8, 9))

# ---- figures

def test_figures_do_not_pile_up_in_pyplot_and_show_themselves():
    before = plt.get_fignums()
    figs = [grid(torch.rand(3, 3, 8, 8)), panel([dict(a=torch.rand(3, 8, 8))]), curve([1., 2, 3])]
    assert plt.get_fignums() == before
    for f in figs:
        bundle = f._repr_mimebundle_()
        assert isinstance(f, Figure) and bundle['image/png'].startswith(b'\x89PNG')

@pytest.mark.parametrize('n, ncols', [(1, 8), (5, 8), (5, 2), (8, 8)])
def test_grid_shows_every_image(n, ncols):
    fig = grid([torch.zeros(3, 6, 9)]*n, [str(i) for i in range(n)], ncols=ncols)
    assert sum(len(ax.images) for ax in fig.axes) == n and [ax.get_title() for ax in fig.axes if ax.images] == [str(i) for i in range(n)]

def test_grid_of_maps_shares_one_scale():
    weak, strong = (ax.images[0].get_array() for ax in grid(torch.stack([torch.full((1, 2, 2), v) for v in (.1, .9)]), cmap='gray').axes)
    assert (weak == 0).all() and (strong == 255).all()
    fixed = grid(torch.full((1, 1, 2, 2), .5), cmap='gray', vmin=0, vmax=1).axes[0].images[0].get_array()
    assert abs(int(fixed[0, 0, 0]) - 128) <= 1

def test_grid_of_constant_or_nan_maps_is_drawn():
    assert pixels(grid([torch.full((1, 3, 3), .4), torch.full((1, 3, 3), float('nan'))], cmap='viridis')).size

def test_grid_errors():
    with pytest.raises(ValueError, match='no image'): grid([])
    with pytest.raises(ValueError, match='1 titles for 2 images'): grid(torch.zeros(2, 3, 4, 4), ['a'])

def test_panel_columns_rows_and_gaps():
    fig = panel([dict(a=torch.rand(3, 8, 8), m=torch.rand(1, 8, 8)), dict(m=torch.rand(1, 8, 8)*9, t='text', b=torch.ones(1, 8, 8, dtype=torch.bool))])
    assert [ax.get_title() for ax in fig.axes[:4]] == ['a', 'm', 't', 'b']
    assert [len(ax.images) for ax in fig.axes] == [1, 1, 0, 0, 0, 1, 0, 1] and fig.axes[6].texts[0].get_text() == 'text'
    with pytest.raises(ValueError, match='no row'): panel([])

def test_panel_scales_maps_by_column():
    fig = panel([dict(m=torch.tensor([[[0., 1.]]])), dict(m=torch.tensor([[[0., 10.]]]))])
    low, high = (ax.images[0].get_array() for ax in fig.axes)
    assert (low[0, 0] == high[0, 0]).all() and not (low[0, 1] == high[0, 1]).all()

@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.floats(0, .99))
def test_smoothed_stays_within_the_values(v, s):
    m = smoothed(v, s)
    assert len(m) == len(v) and abs(m[0] - v[0]) < 1e-6 and m.min() >= min(v) - 1e-6 and m.max() <= max(v) + 1e-6

def test_smoothed_by_nothing_is_as_measured_and_one_is_an_error():
    assert smoothed([1., 5, 2], 0).tolist() == [1, 5, 2]
    with pytest.raises(ValueError, match='smooth = 1 must be'): smoothed([1.], 1)

def test_curves_of_several_names_one_value_or_none_are_drawn():
    fig = curve({'a': [3., 2, 1], 'b': [1.], 'c': []}, log=True)
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ['a', 'b', 'c'] and fig.axes[0].get_yscale() == 'log'
    assert pixels(fig).size

def test_palette_keeps_white_paper_and_the_peak_of_a_map():
    m = torch.zeros(1, 64, 64); m[:, 30:33, 30:33] = 1
    x = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    fig = grid([x, colorize(m)], ['noise', 'peak'])
    small, full = pixels(fig), pixels(fig, colors=None)
    assert len(figure_png(fig)) < .6*len(figure_png(fig, colors=None)) and (small[0, 0] == 255).all()
    peak = np.argwhere((abs(full.astype(int) - (253, 231, 37)).sum(-1) < 6))
    assert len(peak) and abs(small[tuple(peak.T)].astype(int) - full[tuple(peak.T)]).mean() < 16
    with pytest.raises(ValueError, match='colors = 300'): figure_png(fig, colors=300)

def test_dpi_sets_the_size():
    fig = grid(torch.zeros(1, 3, 8, 8))
    assert pixels(fig, dpi=150).shape[0] > 1.8*pixels(fig, dpi=75).shape[0]

def test_same_input_same_bytes():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert figure_png(grid(x, ['a', 'b'])) == figure_png(grid(x, ['a', 'b']))

def test_a_small_image_displays_and_saves_the_same_bytes(tmp_path):
    im = SmallImage(Image.linear_gradient('L'))
    im.save(tmp_path/'x.png')
    assert (tmp_path/'x.png').read_bytes() == im._repr_png_() == palette_png(im.image, 128)

# ---- masks

@settings(max_examples=25, deadline=None)
@given(arrays(bool, (9, 8)))
def test_the_inner_border_lies_inside_and_the_outer_one_outside(a):
    m = torch.from_numpy(a)[None]
    assert not (mask_border(m) & ~m).any() and not (mask_border(m, inner=False) & m).any()

def test_marked_places_differ():
    x, m = torch.full((3, 16, 16), .5), torch.zeros(1, 16, 16, dtype=torch.bool)
    m[:, 4:8, 4:8] = True
    y = marked(x, m, (1., 0, 0))
    assert (y[0][m[0]] > .8).all() and (y[:, ~m[0]] == y[:, 0, 0][:, None]).all()
    assert torch.equal(marked(x, m, MARKED, torch.zeros_like(m)), marked(x, m, MARKED))

# ---- threads

def test_formulas_are_drawn_in_several_threads_at_once():
    "mathtext is not thread-safe: without the lock this raises, or mixes up formulas."
    def make(k):
        fig = Figure(figsize=(2, 1), dpi=50)
        for i in range(4): fig.text(.1, .2*i, rf'$\hat T_{{{i}}} = \frac{{{k}}}{{\sqrt{{{i + 1}}}}}$')
        return fig
    expected = [figure_png(make(k)) for k in range(6)]
    got, wrong = {}, []
    def draw(k):
        try: got[k] = [figure_png(make(k)) for _ in range(5)]
        except Exception as e: wrong.append(e)
    threads = [threading.Thread(target=draw, args=(k,)) for k in range(6)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert not wrong and all(png == expected[k] for k in range(6) for png in got[k])

def test_everything_that_lays_out_text_waits_for_the_lock():
    fig, done = curve([1., 2., 3.]), []
    tasks = [lambda: fig.savefig(io.BytesIO()), fig.tight_layout, lambda: figure_png(fig)]
    threads = [threading.Thread(target=lambda f=f: done.append(f()), daemon=True) for f in tasks]
    with drawing_lock:
        for t in threads: t.start()
        for t in threads: t.join(.1)
        assert not done
    for t in threads: t.join(30)
    assert len(done) == 3
