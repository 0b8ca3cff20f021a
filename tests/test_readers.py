"Whole pixels are read whatever stands beside them, in every format; pixels that are damaged are not."
import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, PngImagePlugin

from dynad.collector import EXTENSIONS
from dynad.config import ConfigError, DataSettings, content_key, make_config, with_overrides
from dynad.data import DataError, Sample, load_images, load_masks, read_image, read_mask, with_mask_rule
from dynad.images import Notes, decode, image_size
from dynad.metadata import read_exif, read_metadata

PIXELS = np.kron(np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)) # 48 × 80
LOSSLESS = {'jpg': dict(quality=95), 'png': {}, 'webp': dict(lossless=True), 'tif': {}, 'avif': dict(quality=95), 'heic': dict(quality=95)}
FORMATS = [f for f in LOSSLESS if f'.{f}' in EXTENSIONS]
TURNED = Image.Exif(); TURNED[274], TURNED[305] = 6, 'a camera of a long name'

def saved(path, **kw):
    Image.fromarray(PIXELS).save(path, **LOSSLESS.get(path.suffix[1:], {}), **kw)
    return path

def read(path, size=16):
    "The image, its (width, height) and the texts of what is said of it."
    notes = Notes()
    with warnings.catch_warnings():
        warnings.simplefilter('error') # Pillow's own warnings name no file
        x = read_image(path, size, notes=notes)
        assert image_size(path, Notes()) == decode(path, notes=Notes()).size
    return x, image_size(path, Notes()), [t for _, t, _ in notes.texts()]

def patched(path, old: bytes, new: bytes):
    raw = path.read_bytes()
    assert raw.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(raw.replace(old, new))
    return path

def chunk(kind: bytes, data: bytes, checksum=None) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data) if checksum is None else checksum)

def with_chunk(path, extra: bytes, before=b'IDAT'):
    raw = saved(path).read_bytes()
    at = raw.index(before) - 4
    path.write_bytes(raw[:at] + extra + raw[at:])
    return path

def segment(marker: int, data: bytes) -> bytes: return bytes([0xFF, marker]) + struct.pack('>H', len(data) + 2) + data

def with_segment(path, extra: bytes):
    raw = saved(path).read_bytes()
    path.write_bytes(raw[:2] + extra + raw[2:])
    return path

# ---- EXIF, every format

BROKEN_EXIF = {'junk': b'Exif\0\0' + b'\xff'*20, 'cut': b'Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03', 'loop': b'Exif\0\0II*\0\x00\0\0\0'}

@pytest.mark.parametrize('kind', BROKEN_EXIF)
@pytest.mark.parametrize('ext', ['jpg', 'png', 'webp'])
def test_an_exif_block_that_is_none(tmp_path, ext, kind):
    want = read(saved(tmp_path/f'plain.{ext}'))[0]
    x, size, said = read(saved(tmp_path/f'a.{ext}', exif=BROKEN_EXIF[kind]))
    assert torch.equal(x, want) and size == (80, 48)
    assert len(said) == 1 and said[0].startswith(f'{tmp_path}/a.{ext}: metadata that cannot be read is left out') and 'EXIF' in said[0]

@pytest.mark.parametrize('ext', FORMATS)
def test_an_orientation_that_can_be_read_is_followed_whatever_the_other_entries(tmp_path, ext):
    want = read(saved(tmp_path/f'plain.{ext}'))[0].rot90(-1, (1, 2))
    x, size, said = read(saved(tmp_path/f'a.{ext}', exif=TURNED.tobytes()))
    assert size == (48, 80) and said == [] and (x - want).abs().max() < .03
    if ext in ('avif', 'heic', 'tif'): return
    x, size, said = read(saved(tmp_path/f'b.{ext}', exif=TURNED.tobytes()[:-8])) # the name of the camera is cut off
    assert size == (48, 80) and len(said) == 1 and (x - want).abs().max() < .03

@pytest.mark.parametrize('ext', [f for f in FORMATS if f in ('avif', 'heic')])
@pytest.mark.parametrize('junk', [b'\xff'*12, b'MM\0*\0\0\0\x08\0\x02\xff\xff'])
def test_exif_in_avif_and_heic(tmp_path, ext, junk):
    plain = read(saved(tmp_path/f'plain.{ext}'))[0]
    whole = Image.Exif(); whole[305] = 'a camera of a long name'
    raw = saved(tmp_path/f'a.{ext}', exif=whole.tobytes()).read_bytes()
    at = raw.index(b'MM\0*')
    (tmp_path/f'a.{ext}').write_bytes(raw[:at] + junk + raw[at + 12:])
    x, size, said = read(tmp_path/f'a.{ext}')
    assert torch.equal(x, plain) and size == (80, 48) and len(said) == 1 and 'metadata' in said[0]

def test_an_orientation_in_xmp_and_in_a_text_of_imagemagick(tmp_path):
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = PngImagePlugin.PngInfo(); text.add_itxt('XML:com.adobe.xmp', packet.decode())
    raw = PngImagePlugin.PngInfo(); raw.add_text('Raw profile type exif', '\nexif\n      10\n' + TURNED.tobytes().hex(), zip=True)
    files = [saved(tmp_path/'a.jpg', xmp=packet), saved(tmp_path/'a.webp', xmp=packet), saved(tmp_path/'a.png', pnginfo=text), saved(tmp_path/'b.png', pnginfo=raw)]
    for p in files: assert read(p)[1:] == ((48, 80), []), p
    x, size, said = read(saved(tmp_path/'c.jpg', xmp=packet.replace(b'"6"', b'"x"')))
    assert size == (80, 48) and said == []

def test_exif_after_the_pixels_of_a_png(tmp_path):
    p = with_chunk(tmp_path/'a.png', chunk(b'eXIf', TURNED.tobytes()[6:]), before=b'IEND')
    assert read(p)[1:] == ((48, 80), [])

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80), st.sampled_from(['jpg', 'png', 'webp']), st.booleans())
def test_no_exif_whatever_condemns_pixels(tmp_path, block, ext, header):
    p = saved(tmp_path/f'x.{ext}', exif=b'Exif\0\0' + (b'II*\0\x08\0\0\0' if header else b'') + block)
    x, size, said = read(p, 8)
    assert sorted(size) == [48, 80] and len(said) <= 1 and x.std() > .1

@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_exif_of_any_bytes_is_read_or_named(block):
    turn, trouble = read_exif(block)
    assert turn in (None, *range(1, 9)) and (trouble is None or 'EXIF' in trouble)

# ---- the other blocks

def test_png_chunks(tmp_path):
    want = read(saved(tmp_path/'plain.png'))[0]
    long, chunks = b'x'*(2 << 20), {}
    chunks['zTXt'] = chunk(b'zTXt', b'Comment\0\0' + zlib.compress(long)), 'a comment (Comment) of more than 1 MB'
    chunks['iTXt'] = chunk(b'iTXt', b'Comment\0\1\0de\0\0' + zlib.compress(long)), 'a comment (Comment) of more than 1 MB'
    chunks['tEXt'] = chunk(b'tEXt', b'Comment\0' + long), 'a comment (Comment) of more than 1 MB'
    chunks['torn'] = chunk(b'zTXt', b'Comment\0\0no zlib'), 'a comment (Comment) that cannot be unpacked'
    chunks['icc'] = chunk(b'iCCP', b'name\0\0' + zlib.compress(b'no profile')), 'a broken ICC profile'
    chunks['icc method'] = chunk(b'iCCP', b'name\0\x07junk'), 'a broken ICC profile'
    chunks['sum'] = chunk(b'tEXt', b'Comment\0short', checksum=1), 'a chunk tEXt with a wrong checksum'
    chunks['hex'] = chunk(b'tEXt', b'Raw profile type exif\0\nexif\n 4\nzz'), 'EXIF that is not hexadecimal'
    chunks['short phys'] = chunk(b'pHYs', b'\0'), None
    chunks['short gamma'] = chunk(b'gAMA', b''), None
    chunks['many'] = b''.join(chunk(b'zTXt', b'C\0\0' + zlib.compress(b'y'*(1 << 20))) for _ in range(80)), None # 80 MB unpacked
    for name, (extra, words) in chunks.items():
        x, size, said = read(with_chunk(tmp_path/f'{name}.png', extra))
        assert torch.equal(x, want) and size == (80, 48), name
        assert (words is None and said == []) or (len(said) == 1 and words in said[0]), (name, said)

def test_jpeg_segments(tmp_path):
    want = read(saved(tmp_path/'plain.jpg'))[0]
    profile = b'ICC_PROFILE\0\1\1' + b'no profile'
    odd = {'comment': (segment(0xFE, b'c'*65000), None), 'icc': (segment(0xE2, profile), 'a broken ICC profile'),
           'mpf': (segment(0xE2, b'MPF\0II*\0\xff\xff\xff\xff'), None), 'photoshop': (segment(0xED, b'Photoshop 3.0\x008BIM\xff'), None),
           'adobe': (segment(0xEE, b'Adobe'), None), 'jfif': (segment(0xE0, b'JFIF\0'), None), 'resolution': (segment(0xE0, b'JFIF\0\1\1\7\0\0\0\0\0\0'), None),
           'short length': (b'\xff\xe7\0\x04ab' + b'left over', '9 bytes that belong to no segment'), 'padding': (b'\xff'*30, None), 'no length': (b'\xff\xe7\0\0', None)}
    for name, (extra, words) in odd.items():
        x, size, said = read(with_segment(tmp_path/f'{name}.jpg', extra))
        assert torch.equal(x, want) and size == (80, 48), name
        assert (words is None and said == []) or (len(said) == 1 and words in said[0]), (name, said)

def test_several_images_in_one_jpeg_of_a_phone(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path/'a.mpo', save_all=True, append_images=[Image.fromarray(255 - PIXELS)], quality=95)
    (tmp_path/'a.jpg').write_bytes((tmp_path/'a.mpo').read_bytes())
    assert torch.equal(read(tmp_path/'a.jpg')[0], read(saved(tmp_path/'plain.jpg'))[0])
    b = bytearray((tmp_path/'a.jpg').read_bytes()); at = b.index(b'MPF\0'); b[at + 4:at + 40] = b'\xff'*36
    (tmp_path/'a.jpg').write_bytes(b)
    assert torch.equal(read(tmp_path/'a.jpg')[0], read(tmp_path/'plain.jpg')[0])

def test_colours_of_a_jpeg_do_not_depend_on_what_is_left_out(tmp_path):
    grey = Image.fromarray(PIXELS)
    for name, im in dict(cmyk=grey.convert('CMYK'), rgb=grey, grey=grey.convert('L')).items():
        im.save(tmp_path/f'{name}.jpg', quality=95); im.save(tmp_path/f'{name}2.jpg', quality=95, exif=BROKEN_EXIF['junk'], comment=b'x'*60000)
        assert torch.equal(read(tmp_path/f'{name}.jpg')[0], read(tmp_path/f'{name}2.jpg')[0]), name
    grey.convert('CMYK').save(tmp_path/'plain.tif')
    assert (read(tmp_path/'cmyk.jpg', 10)[0] - read(tmp_path/'plain.tif', 10)[0]).abs().max() < .05 # not inverted

def test_webp_chunks(tmp_path):
    want = read(saved(tmp_path/'plain.webp'))[0]
    x, _, said = read(saved(tmp_path/'a.webp', icc_profile=b'no profile', xmp=b'<not'))
    assert torch.equal(x, want) and 'a broken ICC profile' in said[0]

@pytest.mark.parametrize('big', [False, True])
@pytest.mark.parametrize('compression', [None, 'tiff_lzw', 'tiff_adobe_deflate', 'jpeg'])
def test_tiff_tags(tmp_path, compression, big):
    kw = dict(compression=compression, big_tiff=big)
    want = read(saved(tmp_path/'plain.tif', **kw))[0]
    p = saved(tmp_path/'a.tif', software='a program of a long name', resolution_unit=2, dpi=(300, 300), **kw)
    raw = bytearray(p.read_bytes()); width = 8 if raw[2] == 43 else 4                # libtiff writes no BigTIFF here
    at = raw.index(b'\x31\x01\x02\0') + 4 + width; raw[at:at + width] = b'\xff'*width # the program's name lies nowhere
    at = raw.index(b'\x1a\x01\x05\0') + 2; raw[at] = 99                        # the resolution is of a type that is none
    p.write_bytes(raw)
    x, size, said = read(p)
    assert torch.equal(x, want) and size == (80, 48)
    assert len(said) == 1 and 'the TIFF tags 282, 305' in said[0]

def test_a_turned_tiff_with_a_broken_tag(tmp_path):
    want = read(saved(tmp_path/'plain.tif'))[0].rot90(-1, (1, 2))
    p = patched(saved(tmp_path/'a.tif', exif=TURNED), b'\x31\x01\x02\0', b'\x31\x01\x63\0')
    x, size, said = read(p)
    assert size == (48, 80) and (x - want).abs().max() < .03 and 'the TIFF tag 305' in said[0]

def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    a = (30000 + np.arange(256).reshape(16, 16)).astype('uint16')
    for name in ('a.png', 'a.tif'):
        Image.fromarray(a).save(tmp_path/name)
        plain = read_image(tmp_path/name, 16)
        Image.fromarray(a).save(tmp_path/f'b{name}', **(dict(exif=BROKEN_EXIF['cut']) if 'png' in name else dict(description='x'*30)))
        assert torch.equal(read_image(tmp_path/f'b{name}', 16, notes=Notes()), plain) and len(plain.unique()) > 250

# ---- damaged pixels stay an error

@pytest.mark.parametrize('ext', FORMATS)
@pytest.mark.parametrize('share', [.3, .6, .9])
def test_pixels_that_are_cut_off_are_an_error_with_and_without_metadata(tmp_path, ext, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name, kw in dict(plain={}, odd=dict(exif=TURNED.tobytes())).items():
        p = tmp_path/f'{name}.{ext}'
        noise.save(p, **LOSSLESS[ext], **kw)
        read_image(p, 16)
        p.write_bytes(p.read_bytes()[:int(share*p.stat().st_size)])
        with pytest.raises(DataError, match=f'{p.name}: '): read_image(p, 16)

def test_a_wrong_checksum_of_pixels_is_an_error(tmp_path):
    p = with_chunk(tmp_path/'a.png', chunk(b'zTXt', b'C\0\0' + zlib.compress(bytes(2 << 20))))
    raw = bytearray(p.read_bytes()); at = raw.rindex(b'IEND') - 10; raw[at] ^= 1; p.write_bytes(raw)
    with pytest.raises(DataError, match='a.png: damaged or cut off'): read_image(p, 16)

# ---- pages

def pages(path, n=3, **kw):
    ims = [Image.fromarray(np.full((8, 8, 3), 60*i + 50, np.uint8)) for i in range(n)]
    ims[0].save(path, save_all=True, append_images=ims[1:], **kw)
    return path

@pytest.mark.parametrize('name', ['a.tif', 'b.png', 'a.gif', 'a.webp'] + ['a.avif']*('.avif' in EXTENSIONS))
def test_the_first_page_is_used_and_said(tmp_path, name):
    kw = dict(lossless=True) if 'webp' in name else dict(quality=95) if 'avif' in name else {}
    x, size, said = read(pages(tmp_path/name, **kw), 8)
    assert (x*255 - 50).abs().max() <= 3 and len(said) == 1 and 'of which only the first is used (3 pages)' in said[0]
    assert read(pages(tmp_path/f'one_{name}', 1, **kw), 8)[2] == []

def test_pages_of_a_set_are_said_once(tmp_path):
    files = [pages(tmp_path/f'{i}.tif', 2 + i) for i in range(3)]
    samples = [Sample(p.name, p, 0, 'good', 'train') for p in files]
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        load_images(samples, 8); load_images(samples, 8)
    assert [str(x.message) for x in w] == [f'{files[0]}: more than one page or frame, of which only the first is used (2 pages, as in 2 more files)']

def test_a_chain_of_pages_that_leads_back_to_itself(tmp_path):
    raw = bytearray(pages(tmp_path/'a.tif', 2).read_bytes())
    first = struct.unpack('<I', raw[4:8])[0]; n = struct.unpack('<H', raw[first:first + 2])[0]
    raw[first + 2 + 12*n:first + 6 + 12*n] = struct.pack('<I', first)
    assert read_metadata(io.BytesIO(raw)).pages == 1

def test_smaller_versions_of_a_page_are_no_pages(tmp_path):
    from PIL.TiffImagePlugin import AppendingTiffWriter
    with AppendingTiffWriter(str(tmp_path/'a.tif'), new=True) as f:
        for i, kind in enumerate((0, 1, 1)):
            Image.fromarray(PIXELS[::1 + i, ::1 + i]).save(f, 'TIFF', tiffinfo={254: kind}); f.newFrame()
    assert read(tmp_path/'a.tif')[2] == []

# ---- many pixels

def test_max_pixels_admits_and_refuses(tmp_path):
    p = tmp_path/'scan.png'
    Image.new('1', (12000, 8000)).save(p)
    with pytest.raises(DataError, match=r'scan.png: too large to be decoded safely \(12000×8000 pixels, and 89478485 are allowed\).*--set data.max_pixels=100000000'): read_image(p, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_image(p, 8, max_pixels=100_000_000).max() == 0 and image_size(p) == (12000, 8000)
        assert not read_mask(p, 8, max_pixels=96_000_000).any()
    with pytest.raises(DataError, match='too large'): read_image(p, 8, max_pixels=95_999_999)
    s = [Sample('scan', p, 1, 'x', 'test', p)]
    for load in (load_images, load_masks):
        with pytest.raises(DataError, match='data.max_pixels'): load(s, 8)
    with pytest.warns(UserWarning, match='nearly black'): assert load_images(s, 8, max_pixels=96_000_000).shape == (1, 3, 8, 8)
    assert load_masks(s, 8, max_pixels=96_000_000)[0].shape == (1, 1, 8, 8)
    assert Image.MAX_IMAGE_PIXELS == 89478485

def test_pillows_limit_is_that_of_the_user_also_among_threads(tmp_path, monkeypatch):
    p = saved(tmp_path/'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 3000)
    wrong = []
    def work():
        for _ in range(30):
            try: read_image(p, 8); wrong.append('admitted')
            except DataError as e:
                if '3000 are allowed' not in str(e): wrong.append(str(e))
    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert wrong == [] and Image.MAX_IMAGE_PIXELS == 3000

def test_these_settings_change_no_key_of_a_run():
    from dynad.method import method_named, trained_settings
    plain = make_config('smoke')
    assert {'max_pixels', 'mask_rule'}.isdisjoint(plain.model_dump()['data']) and content_key(DataSettings()) == content_key(dict(image_size=256, holdout=.2, min_holdout=5, max_calibration=256))
    other = with_overrides(plain, {'data.max_pixels': 10**8, 'data.mask_rule': 'nonzero'})
    assert (other.data.max_pixels, other.data.mask_rule) == (10**8, 'nonzero') and with_overrides(other, {'seed': 0}) == other
    for name in ('dynad', 'patchcore'):
        method = method_named(name)
        assert trained_settings(method, plain) == trained_settings(method, other) != trained_settings(method, with_overrides(plain, {'data.holdout': .3}))
    with pytest.raises(ConfigError, match="data.mask_rule = 'all'.*half"): make_config('smoke', {'data.mask_rule': 'all'})
    with pytest.raises(ConfigError, match='data.max_pixels = 0'): make_config('smoke', {'data.max_pixels': 0})

# ---- masks

def test_a_mask_of_another_size_in_the_same_proportions(tmp_path):
    saved(tmp_path/'x.png')                                                    # 80 × 48
    m = np.zeros((24, 40), np.uint8); m[6:12, 10:20] = 255
    Image.fromarray(m).save(tmp_path/'m.png')
    s = Sample('x', tmp_path/'x.png', 1, 'spot', 'test', tmp_path/'m.png')
    with pytest.warns(UserWarning, match=r'm\.png: a mask of another size than its image, in the same proportions, is resized to it \(40×24 for an image of 80×48\)'):
        masks, has = load_masks([s], 48)
    Image.fromarray(m.repeat(2, 0).repeat(2, 1)).save(tmp_path/'m.png')
    assert has.all() and torch.equal(masks, load_masks([s], 48)[0])
    for shape in ((48, 40), (80, 48), (50, 80)):
        Image.fromarray(np.full(shape, 255, np.uint8)).save(tmp_path/'m.png')
        with pytest.raises(DataError, match=f'm.png: the mask is {shape[1]}×{shape[0]} pixels, but its image x.png is 80×48; make a mask'): load_masks([s], 48)

@pytest.mark.parametrize('rule, want', [(None, 1), ('half', 1), ('nonzero', 2)])
def test_mask_rule(tmp_path, rule, want):
    a = np.zeros((8, 8), np.uint8); a[1, 1], a[5, 5] = 240, 80
    Image.fromarray(a).save(tmp_path/'m.png'); Image.fromarray(a).save(tmp_path/'x.png')
    s = Sample('x', tmp_path/'x.png', 1, 'spot', 'test', tmp_path/'m.png')
    assert load_masks(with_mask_rule([s], rule), 8)[0].sum() == want
    assert with_mask_rule([s], None) == [s]
