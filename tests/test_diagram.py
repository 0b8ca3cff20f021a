"Room 02a: flow charts."
import io

import numpy as np
import pytest
import torch
from PIL import Image

from dynad.diagram import INK, Flow, Spot
from dynad.show import figure_png


def drawn(flow):
    buf = io.BytesIO()
    flow.savefig(buf, format='png', dpi=flow.dpi, facecolor='white')
    return np.asarray(Image.open(buf).convert('RGB')).astype(int)

def at(flow, pixels, x, y): return pixels[round((flow.get_figheight() - y)*flow.dpi), round(x*flow.dpi)]

def test_a_image_stands_where_it_was_put():
    f = Flow(4, 3)
    f.image(1, 2, 1, torch.tensor([1., 0, 0])[:, None, None].expand(3, 4, 4))
    f.image(3, 1, 1, torch.tensor([0., 0, 1])[:, None, None].expand(3, 4, 4))
    p = drawn(f)
    assert at(f, p, 1, 2).tolist() == [255, 0, 0] and at(f, p, 3, 1).tolist() == [0, 0, 255] and at(f, p, 3, 2).tolist() == [255]*3

def test_the_returned_place_is_the_border():
    s = Flow(4, 3).box(2, 1, 1, .5, 'x')
    assert s == Spot(2, 1, 1, .5) and s.at('left') == (1.5, 1) and s.at('bottom', -.1) == (1.9, .75)
    with pytest.raises(ValueError, match="side = 'up'; allowed: left, right, top, bottom"): s.at('up')

def test_a_stack_shows_the_channels_that_vary_most():
    quiet, loud = torch.zeros(3, 4, 4), torch.stack([torch.arange(16.).view(4, 4), -torch.arange(16.).view(4, 4)])
    one, two = Flow(3, 3), Flow(3, 3)
    s = one.stack(1.5, 1.5, 1, torch.cat([quiet, loud]), n=2)
    two.stack(1.5, 1.5, 1, loud, n=2)
    assert (drawn(one) == drawn(two)).all() and s.w > 1

def test_a_second_stack_keeps_the_scale_of_the_first():
    z = torch.arange(32.).view(2, 4, 4)
    own, same, faint = Flow(3, 3), Flow(3, 3), Flow(3, 3)
    own.stack(1.5, 1.5, 1, z/2); same.stack(1.5, 1.5, 1, z); faint.stack(1.5, 1.5, 1, z/2, like=z)
    assert (drawn(own) == drawn(same)).all() and (drawn(faint) != drawn(same)).any()

@pytest.mark.parametrize('channels', [torch.zeros(1, 4, 4), torch.full((6, 2, 2), 3.)])
def test_a_constant_or_single_channel_can_be_shown(channels):
    assert Flow(3, 3).stack(1.5, 1.5, 1, channels).w >= 1

def test_an_arrow_passes_its_corners_and_needs_two_points():
    f = Flow(3, 3)
    f.arrow((.5, .5), (.5, 2), (2.5, 2), lw=3)
    p, ink = drawn(f), int(INK[1:3], 16)
    for x, y in ((.5, 1.2), (1.5, 2)): assert np.abs(at(f, p, x, y) - ink).max() < 40
    assert at(f, p, 1.5, 1.2).tolist() == [255]*3
    with pytest.raises(ValueError, match=r'1 point\(s\); from and to are needed'): f.arrow((0, 0))

def test_images_do_not_move_the_frame():
    f = Flow(4, 3)
    f.image(1, 1, 1, torch.zeros(3, 4, 4)); f.group(.2, .2, 3.8, 2.8, 'title'); f.box(3, 2, 1, .5, '$x$')
    assert f.ax.get_xlim() == (0, 4) and f.ax.get_ylim() == (0, 3) and figure_png(f).startswith(b'\x89PNG')
