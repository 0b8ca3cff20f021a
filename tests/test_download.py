"Modules layouts and download: VisA and BTAD as shipped, published counts, downloads over a server that misbehaves, archives that mean harm."
import hashlib
import io
import multiprocessing
import os
import stat
import tarfile
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dynad.archives as module
from dynad.archives import fetch, unpack
from dynad.data import DataError, load_images, load_masks, open_dataset
from dynad.download import PUBLISHED, SOURCES, compare_counts, download, missing
from dynad.layouts import LAYOUTS, Sample
from dynad.images import read_mask

real = pytest.mark.skipif(not os.environ.get('DYNAD_DATA'), reason='DYNAD_DATA is not set')

def put(path: Path, value=90, side=(12, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(value if isinstance(value, np.ndarray) else np.full(side, value, np.uint8)).save(path)
    return path

def ids(*spots, side=(12, 16)):
    a = np.zeros(side, np.uint8)
    for k, (y, x) in enumerate(spots, 1): a[y:y + 4, x:x + 4] = k
    return a

def visa(root: Path, categories=('candle', 'pcb1')) -> Path:
    "The exact layout of VisA_20220922.tar, small."
    rows = ['object,split,label,image,mask']
    for c in categories:
        d = f'{c}/Data'
        for i in range(5):
            put(root/d/f'Images/Normal/{i:04}.JPG', 90 + i)
            rows.append(f"{c},{'train' if i < 3 else 'test'},normal,{d}/Images/Normal/{i:04}.JPG,")
        for i in range(2):
            put(root/d/f'Images/Anomaly/{i:03}.JPG', 30 + i); put(root/d/f'Masks/Anomaly/{i:03}.png', ids((1, 1), (6, 8)))
            rows.append(f'{c},test,anomaly,{d}/Images/Anomaly/{i:03}.JPG,{d}/Masks/Anomaly/{i:03}.png')
        (root/c/'image_anno.csv').write_text('image,label,mask\n')
    (root/'split_csv').mkdir(exist_ok=True)
    for n in ('1cls', '2cls_fewshot', '2cls_highshot'): (root/f'split_csv/{n}.csv').write_text('\n'.join(rows) + '\n')
    (root/'LICENSE-DATASET').write_text('CC BY 4.0')
    return root

def btad(root: Path) -> Path:
    "The exact layout of btad.zip's BTech_Dataset_transformed, small."
    for c, image, mask in (('01', 'bmp', 'png'), ('02', 'png', 'png'), ('03', 'bmp', 'bmp')):
        for i in range(4): put(root/f'{c}/train/ok/{i:04}.{image}', 90 + i)
        for i in range(2):
            put(root/f'{c}/test/ok/{i:04}.{image}', 100 + i); put(root/f'{c}/test/ko/{i:04}.{image}', 30 + i)
            put(root/f'{c}/ground_truth/ko/{i:04}.{mask}', (ids((2, 3)) > 0).astype('uint8')*255)
    return root

# ---- layouts

def test_visa_as_shipped(tmp_path):
    root = visa(tmp_path/'VisA')
    with pytest.raises(DataError, match='holds the categories candle, pcb1; choose one'): open_dataset(root)
    data = open_dataset(root, layout='visa', category='pcb1')
    assert (data.name, data.layout, data.category) == ('VisA/pcb1', 'visa', 'pcb1')
    assert len(data.train) == 3 and [(s.name, s.defect) for s in data.test] == [('Data/Images/Normal/0003.JPG', 'good'), ('Data/Images/Normal/0004.JPG', 'good'),
        ('Data/Images/Anomaly/000.JPG', 'anomaly'), ('Data/Images/Anomaly/001.JPG', 'anomaly')]
    masks, has = load_masks(data.test, 16)
    assert has.all() and [int(m.sum()) > 0 for m in masks] == [False, False, True, True]
    assert open_dataset(root/'pcb1').fingerprint == data.fingerprint == open_dataset(root, category='pcb1').fingerprint

def test_visa_masks_hold_class_numbers(tmp_path):
    data = open_dataset(visa(tmp_path/'v', ['candle']))
    s = data.test[-1]
    with pytest.raises(DataError, match='mask values from 0 to 2 of 255'): read_mask(s.mask, 12)
    a = np.asarray(Image.open(s.mask)) != 0
    assert a.sum() == 32 and torch.equal(load_masks([s], 12)[0][0, 0].any(1), torch.from_numpy(a.any(1)))

@pytest.mark.parametrize('palette', [False, True])
def test_nonzero_masks(tmp_path, palette):
    im = Image.fromarray(ids((0, 0), (5, 5)))
    if palette: im = im.convert('P'); im.putpalette([0]*6 + [9, 9, 9] + [0]*759) # the first kind of defect is painted black
    im.save(tmp_path/'m.png')
    want = torch.from_numpy(ids((0, 0), (5, 5)) > 0)
    assert torch.equal(read_mask(tmp_path/'m.png', 16, nonzero=True)[0][:4, :4], want[:3].repeat_interleave(2, 0)[:4, :4]) and read_mask(tmp_path/'m.png', 16, nonzero=True).any()

def test_the_mask_rule_is_part_of_the_fingerprint_and_checked(tmp_path):
    from dataclasses import replace
    data = open_dataset(visa(tmp_path/'v', ['candle']))
    other = replace(data, samples=tuple(replace(s, mask_rule='half') for s in data.samples))
    assert other.fingerprint != data.fingerprint
    with pytest.raises(DataError, match="mask_rule = 'max'; allowed: half, nonzero"): Sample('a', Path('a'), 0, 'good', 'train', None, 'max')

def edit(root, f):
    t = root/'split_csv/1cls.csv'; t.write_text(f(t.read_text()))

@pytest.mark.parametrize('change, words', [
    (lambda t: t.replace('candle/Data/Images/Normal/0001.JPG', '../../etc/passwd'), r"1cls\.csv: line 3: the path '\.\./\.\./etc/passwd' leads out"),
    (lambda t: t.replace('candle/Data/Images/Normal/0001.JPG', '/etc/passwd'), "the path '/etc/passwd' leads out"),
    (lambda t: t.replace('object,split', 'object,part'), r'the column split is missing; expected object,split,label,image,mask'),
    (lambda t: t.replace('candle,train,normal', 'candle,val,normal', 1), "line 2 has split = 'val'"),
    (lambda t: t.replace('candle,test,anomaly', 'candle,train,anomaly', 1), 'an anomalous image among the training ones'),
    (lambda t: t.replace('candle,', 'kerze,'), "no line of 'candle'"),
    (lambda t: '', 'the columns .* is missing'),
    (lambda t: t + 'candle,train\n', "label = ''"),
    (lambda t: t.replace('Normal/0001.JPG', 'Normal/9999.JPG'), r'9999\.JPG: named in 1cls\.csv, but not there \(as are 0 more of 7')])
def test_a_visa_table_that_cannot_be_used(tmp_path, change, words):
    root = visa(tmp_path/'v', ['candle']); edit(root, change)
    with pytest.raises(DataError, match=words): open_dataset(root, layout='visa')

def test_visa_files_missing_or_spare(tmp_path):
    root = visa(tmp_path/'v', ['candle'])
    spare = put(root/'candle/Data/Images/Normal/0077.JPG')
    with pytest.warns(UserWarning, match=r'1 image of Data/Images/Normal \(Data/Images/Normal/0077\.JPG\)') as w: open_dataset(root)
    assert all(x.filename == __file__ for x in w)
    spare.unlink(); (root/'candle/Data/Masks/Anomaly/001.png').unlink()
    with pytest.raises(DataError, match=r'Masks/Anomaly/001\.png: named in 1cls\.csv, but not there'): open_dataset(root)
    (root/'split_csv/1cls.csv').unlink()
    with pytest.raises(DataError, match=r"1cls\.csv: no such file; .*unpack VisA's archive whole"): open_dataset(root/'candle')

@pytest.mark.parametrize('category', ['01', '02', '03'])
def test_btad_as_shipped(tmp_path, category):
    data = open_dataset(btad(tmp_path/'BTech_Dataset_transformed'), category=category)
    assert (data.layout, len(data.train), len(data.test)) == ('btad', 4, 4)
    assert {(s.label, s.defect, s.split) for s in data.samples} == {(0, 'good', 'train'), (0, 'good', 'test'), (1, 'ko', 'test')}
    masks, has = load_masks(data.test, 16)
    assert has.all() and sum(int(m.sum()) > 0 for m in masks) == 2
    assert load_images(data.train, 8).shape == (4, 3, 8, 8)

def test_btad_is_not_taken_for_mvtec(tmp_path):
    root = btad(tmp_path/'b')
    assert open_dataset(root/'02').layout == 'btad'
    with pytest.raises(DataError, match='not a folder of layout mvtec'): open_dataset(root, layout='mvtec', category='02')
    (root/'02/train/good').mkdir(); (root/'02/train/ok').rename(root/'02/train/good/x')
    assert open_dataset(root/'02').layout == 'mvtec'
    with pytest.raises(DataError, match="layout = 'coco' does not exist; allowed: auto, mvtec, mtd, elpv, visa, btad, folder"): open_dataset(root, layout='coco')
    assert list(LAYOUTS) == ['mvtec', 'mtd', 'elpv', 'visa', 'btad', 'folder']

# ---- counts

def test_the_published_totals():
    n = lambda name, p: sum(v[p] for v in PUBLISHED[name].values())
    assert (len(PUBLISHED['mvtec']), n('mvtec', 'train'), n('mvtec', 'test good'), n('mvtec', 'test defective')) == (15, 3629, 467, 1258)
    assert (len(PUBLISHED['visa']), n('visa', 'good'), n('visa', 'defective')) == (12, 9621, 1200)
    assert (n('btad', 'train'), n('btad', 'test good') + n('btad', 'test defective')) == (1799, 741)
    assert sum(PUBLISHED['mtd'][None].values()) == 1344

def test_counts_say_what_is_missing(tmp_path):
    c = compare_counts(visa(tmp_path/'v'), 'visa')
    assert c.published.sum() == 9621 + 1200 and c.found.sum() == 14 and set(c.category) == set(PUBLISHED['visa'])
    assert c[c.category == 'pcb1'].found.tolist() == [5, 2] and 'candle good: 5 of 1000; candle defective: 2 of 100; capsules good: 0 of 602' in missing(c)
    one = compare_counts(tmp_path/'v'/'pcb1', 'visa')
    assert one.found.tolist() == [5, 2] and missing(one) == 'pcb1 good: 5 of 1004; pcb1 defective: 2 of 100 (all: 7 of 1104 images)'
    assert missing(c.assign(found=c.published)) == ''
    with pytest.raises(DataError, match="'imagenet': no counts are known"): compare_counts(tmp_path, 'imagenet')
    with pytest.raises(DataError, match='holds no category of btad'): compare_counts(tmp_path, 'btad')

@real
def test_counts_of_real_folders():
    data = Path(os.environ['DYNAD_DATA'])
    assert missing(compare_counts(data/'magnetic_tile', 'mtd')) == ''
    with pytest.warns(UserWarning, match='7 masks that belong to no image'): c = compare_counts(data/'mvtec_leather_part', 'mvtec')
    leather = c[c.category == 'leather']
    assert leather.published.tolist() == [245, 32, 92] and leather.found.tolist()[0] == 4 and leather.found.sum() == 28 and c.found.sum() == 28

# ---- fetching

BLOB = np.random.default_rng(0).bytes(200_000)
SHA = hashlib.sha256(BLOB).hexdigest()

@contextmanager
def server(behave, blob=BLOB):
    "A server on this machine; `behave(handler, first byte asked, number of the request)` answers."
    seen = []
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_GET(self):
            r = self.headers.get('Range')
            seen.append(r)
            self.close_connection = True
            try: behave(self, int(r[6:-1]) if r else 0, len(seen))
            except (BrokenPipeError, ConnectionResetError): pass
        def head(self, status, **headers):
            self.send_response(status)
            for k, v in headers.items(): self.send_header(k.replace('_', '-'), str(v))
            self.end_headers()
        def whole(self, a, send=None, tag='"v1"'):
            "A correct answer, of which only `send` bytes are sent."
            if a: self.head(206, Content_Range=f'bytes {a}-{len(blob) - 1}/{len(blob)}', Content_Length=len(blob) - a, ETag=tag)
            else: self.head(200, Content_Length=len(blob), ETag=tag)
            self.wfile.write(blob[a:] if send is None else blob[a:a + send])
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    try: yield f'http://127.0.0.1:{s.server_port}/file', seen
    finally: s.shutdown(); s.server_close()

@pytest.fixture(autouse=True)
def quick(monkeypatch): monkeypatch.setattr(module, '_WAIT', .01)

def left(folder): return sorted(p.name for p in folder.iterdir() if not p.name.endswith('.lock'))

def test_a_file_comes_whole_in_one_piece(tmp_path):
    with server(lambda h, a, n: h.whole(a)) as (url, seen):
        assert fetch(url, tmp_path/'f', SHA, len(BLOB), progress=False).read_bytes() == BLOB
        fetch(url, tmp_path/'f', SHA, progress=False)                       # there already: not asked again
    assert seen == [None] and left(tmp_path) == ['f']

def test_a_server_that_breaks_off_is_resumed(tmp_path):
    with server(lambda h, a, n: h.whole(a, 60_000)) as (url, seen): fetch(url, tmp_path/'f', SHA, len(BLOB), progress=False)
    assert seen == [None, 'bytes=60000-', 'bytes=120000-', 'bytes=180000-'] and (tmp_path/'f').read_bytes() == BLOB

def test_a_later_call_goes_on_where_the_first_stopped(tmp_path):
    def dies(h, a, n):
        if n == 1: h.whole(a, 150_000)
    with server(dies) as (url, seen):                                       # after the first, the server closes without a word
        with pytest.raises(DataError, match=r'5 times without a new byte after 150,000 of 200,000; call again later: it continues from there'):
            fetch(url, tmp_path/'f', SHA, len(BLOB), progress=False)
        assert left(tmp_path) == ['f.part', 'f.part.json'] and (tmp_path/'f.part').read_bytes() == BLOB[:150_000]
        seen.clear(); again = url
    with server(lambda h, a, n: h.whole(a)) as (url, seen):
        note = tmp_path/'f.part.json'; note.write_text(note.read_text().replace(again, url)) # a new port is another address: pretend it is not
        fetch(url, tmp_path/'f', SHA, len(BLOB), progress=False)
    assert seen == ['bytes=150000-'] and (tmp_path/'f').read_bytes() == BLOB and left(tmp_path) == ['f']

def test_what_came_from_another_address_is_not_mixed_in(tmp_path):
    (tmp_path/'f.part').write_bytes(b'x'*1000); (tmp_path/'f.part.json').write_text('{"url": "http://elsewhere/"}')
    with server(lambda h, a, n: h.whole(a)) as (url, seen): fetch(url, tmp_path/'f', SHA, progress=False)
    assert seen == [None] and (tmp_path/'f').read_bytes() == BLOB

def test_a_server_without_ranges_starts_again(tmp_path):
    def plain(h, a, n):
        h.head(200, Content_Length=len(BLOB)); h.wfile.write(BLOB if n == 3 else BLOB[:50_000*n])
    with server(plain) as (url, seen): fetch(url, tmp_path/'f', SHA, progress=False)
    assert len(seen) == 3 and (tmp_path/'f').read_bytes() == BLOB

def test_a_file_that_changed_between_two_pieces_starts_again(tmp_path):
    old = bytes(200_000)
    def changed(h, a, n):
        if n == 1: h.head(200, Content_Length=len(old), ETag='"old"'); h.wfile.write(old[:70_000])
        elif h.headers.get('If-Range') == '"new"': h.whole(a, tag='"new"')
        else: h.whole(0, tag='"new"')                                       # If-Range does not hold: the whole of the new file
    with server(changed) as (url, seen): fetch(url, tmp_path/'f', SHA, progress=False)
    assert seen == [None, 'bytes=70000-'] and (tmp_path/'f').read_bytes() == BLOB

def test_a_range_that_was_not_asked_for_is_not_believed(tmp_path):
    def wrong(h, a, n):
        if not a: h.whole(0, 70_000)
        else: h.head(206, Content_Range='bytes 10-199999/200000', Content_Length=199_990); h.wfile.write(BLOB[10:])
    with server(wrong) as (url, seen), pytest.raises(DataError, match='5 times without a new byte after 70,000'): fetch(url, tmp_path/'f', SHA, progress=False)
    assert (tmp_path/'f.part').read_bytes() == BLOB[:70_000]

@pytest.mark.parametrize('says, sends, size, words', [
    (300_000, 200_000, None, 'the connection ended early'),                 # announces more than it has
    (150_000, 150_000, None, 'the published one is'),                       # announces less: cut off without a sign
    (300_000, 200_000, 200_000, "the server's file has 300,000 bytes, the published one 200,000"),
    (None, 200_000, 150_000, 'sends more than the 150,000 bytes'),          # announces nothing and does not stop
])
def test_a_server_that_lies_about_its_length(tmp_path, says, sends, size, words):
    def lie(h, a, n):
        if a: h.head(416, Content_Range=f'bytes */{says}') if n < 3 else h.whole(0, 0)
        else: h.head(200, **({'Content_Length': says} if says else {})); h.wfile.write(BLOB[:sends])
    with server(lie) as (url, seen), pytest.raises(DataError, match=words): fetch(url, tmp_path/'f', SHA, size, progress=False)
    assert not (tmp_path/'f').exists()

def test_without_any_length_the_checksum_decides(tmp_path):
    with server(lambda h, a, n: (h.head(200), h.wfile.write(BLOB))) as (url, _): assert fetch(url, tmp_path/'f', SHA, progress=False).read_bytes() == BLOB

def test_a_wrong_checksum_leaves_nothing(tmp_path):
    with server(lambda h, a, n: h.whole(a)) as (url, _), pytest.raises(DataError, match=f'has the sha256 {SHA}, the published one is {"0"*64}; it was deleted'):
        fetch(url, tmp_path/'f', '0'*64, progress=False)
    assert left(tmp_path) == []

def test_answers_that_end_it_and_answers_that_do_not(tmp_path):
    with server(lambda h, a, n: h.head(404)) as (url, seen), pytest.raises(DataError, match='the server answers 404 Not Found; the address may have changed'): fetch(url, tmp_path/'f', SHA, progress=False)
    assert len(seen) == 1
    with server(lambda h, a, n: h.head(503) if n < 3 else h.whole(a)) as (url, seen): fetch(url, tmp_path/'f', SHA, progress=False)
    assert len(seen) == 3
    with pytest.raises(DataError, match=r'http://127\.0\.0\.1:9/f: .*refused, 5 times'): fetch('http://127.0.0.1:9/f', tmp_path/'g', SHA, progress=False)

@pytest.mark.parametrize('url', ['file:///etc/passwd', 'ftp://x/y', '/etc/passwd', ''])
def test_only_the_web_is_fetched(tmp_path, url):
    with pytest.raises(DataError, match='not an address that can be fetched'): fetch(url, tmp_path/'f', SHA)
    with pytest.raises(DataError, match='expected 64 hexadecimal digits'): fetch('http://x', tmp_path/'f', 'abc')

def test_a_redirect_to_a_file_on_this_machine_is_refused(tmp_path):
    with server(lambda h, a, n: h.head(302, Location='file:///etc/passwd')) as (url, _), pytest.raises(DataError, match='302'): fetch(url, tmp_path/'f', SHA, progress=False)

def test_no_room_is_said_before_anything_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda p: type('U', (), dict(free=1000)))
    with server(lambda h, a, n: h.whole(a)) as (url, _), pytest.raises(DataError, match='200,000 bytes are still to come, but only 1,000 are free'): fetch(url, tmp_path/'f', SHA, progress=False)
    assert left(tmp_path) == []

def test_two_processes_fetch_once(tmp_path):
    with server(lambda h, a, n: (time.sleep(.3), h.whole(a))) as (url, seen):
        fork = multiprocessing.get_context('fork')                          # quick: the child only fetches
        ps = [fork.Process(target=fetch, args=(url, tmp_path/'f', SHA), kwargs=dict(progress=False)) for _ in range(2)]
        for p in ps: p.start()
        for p in ps: p.join()
        assert [p.exitcode for p in ps] == [0, 0]
    assert len(seen) == 1 and (tmp_path/'f').read_bytes() == BLOB

# ---- unpacking

def tar_of(path, *members, mode='w'):
    with tarfile.open(path, mode) as t:
        for name, kind, *content in members:
            m = tarfile.TarInfo(name); m.type = kind; m.linkname = content[0].decode() if content and kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ''
            data = content[0] if content and kind == tarfile.REGTYPE else b''
            m.size, m.mode = len(data), 0o4777
            t.addfile(m, io.BytesIO(data))
    return path

F, D = tarfile.REGTYPE, tarfile.DIRTYPE

@pytest.mark.parametrize('mode', ['w', 'w:gz', 'w:xz', 'w:bz2'])
def test_tars_are_unpacked_without_the_folder_around(tmp_path, mode):
    folder = unpack(tar_of(tmp_path/'a.tar', ('top', D), ('top/a b/ü.txt', F, b'x'), ('top/.DS_Store', F, b''), ('__MACOSX/top', F, b''), mode=mode), tmp_path/'out', progress=False)
    assert (folder/'ü.txt').read_bytes() == b'x'
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []
    assert all(not p.stat().st_mode & 0o7000 for p in folder.rglob('*') if p.is_file())  # no set-uid bit is taken over

@pytest.mark.parametrize('member, words', [
    (('../evil', F, b'x'), 'outside the folder|outside'), (('a/../../evil', F, b'x'), 'outside'), (('/tmp/dynad-evil', F, b'x'), 'outside|absolute'), (('a/..', D), 'outside'),
    (('..\\evil', F, b'x'), 'outside'), (('C:/evil', F, b'x'), 'outside'),
    (('link', tarfile.SYMTYPE, b'/etc/passwd'), "the member 'link' is a link"), (('link', tarfile.SYMTYPE, b'ok'), 'is a link'), (('hard', tarfile.LNKTYPE, b'/etc/passwd'), 'is a link'),
    (('hard', tarfile.LNKTYPE, b'ok'), 'is a link'), (('pipe', tarfile.FIFOTYPE), 'is a device'), (('disk', tarfile.BLKTYPE), 'is a device'), (('tty', tarfile.CHRTYPE), 'is a device'),
    (('ok', F, b'again'), "two members have the name 'ok'"), (('ok/below', F, b'x'), 'cannot be unpacked|two members')])
def test_tars_that_mean_harm_leave_nothing(tmp_path, member, words):
    (tmp_path/'in').mkdir(); (tmp_path/'place').mkdir()
    archive = tar_of(tmp_path/'in/a.tar', ('ok', F, b'x'), member)
    with pytest.raises(DataError, match=words) as e: unpack(archive, tmp_path/'place/out', progress=False)
    assert str(e.value).startswith(str(archive)) and list((tmp_path/'place').iterdir()) == [] and sorted(p.name for p in tmp_path.iterdir()) == ['in', 'place'] and not Path('/tmp/dynad-evil').exists()

def test_a_link_and_then_a_file_through_it(tmp_path):
    (tmp_path/'victim').mkdir()
    archive = tar_of(tmp_path/'a.tar', ('d', tarfile.SYMTYPE, str(tmp_path/'victim').encode()), ('d/evil', F, b'x'))
    with pytest.raises(DataError, match="'d' is a link"): unpack(archive, tmp_path/'out', progress=False)
    assert list((tmp_path/'victim').iterdir()) == []

@pytest.mark.parametrize('name, mode, words', [('../evil', stat.S_IFREG, 'outside'), ('/abs', stat.S_IFREG, 'outside'), ('l', stat.S_IFLNK, 'is a link'), ('dev', stat.S_IFBLK, 'is a device'), ('fifo', stat.S_IFIFO, 'is a device')])
def test_zips_that_mean_harm_leave_nothing(tmp_path, name, mode, words):
    (tmp_path/'place').mkdir()
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        z.writestr('ok.txt', 'x')
        i = zipfile.ZipInfo(name); i.external_attr = (mode | 0o777) << 16
        z.writestr(i, '/etc/passwd')
    with pytest.raises(DataError, match=words): unpack(tmp_path/'a.zip', tmp_path/'place/out', progress=False)
    assert list((tmp_path/'place').iterdir()) == []

@pytest.mark.parametrize('kind', ['w', 'w:gz', 'w:xz', 'zip'])
@pytest.mark.parametrize('harm', ['cut', 'flip', 'text', 'empty'])
def test_damaged_archives(tmp_path, kind, harm):
    noise, p = np.random.default_rng(0).bytes(50_000), tmp_path/'a'
    if kind == 'zip':
        with zipfile.ZipFile(p, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a/x', noise); z.writestr('b/y', noise)
    else: tar_of(p, ('a/x', F, noise), ('b/y', F, noise), mode=kind)
    b = bytearray(p.read_bytes())
    if harm == 'flip' and kind == 'w': pytest.skip('a plain tar has no checksum over its content; the sha256 of the archive covers it')
    p.write_bytes({'cut': b[:len(b)//2], 'flip': b[:30_000] + bytes([b[30_000] ^ 255]) + b[30_001:], 'text': b'hello', 'empty': b''}[harm])
    with pytest.raises(DataError, match='a: '): unpack(p, tmp_path/'out', progress=False)
    assert [q.name for q in tmp_path.iterdir()] == ['a']

def test_unpacking_needs_a_free_place_and_room(tmp_path, monkeypatch):
    a = tar_of(tmp_path/'a.tar', ('x', F, b'x'*5000))
    (tmp_path/'out').mkdir()
    with pytest.raises(DataError, match='out: exists already'): unpack(a, tmp_path/'out')
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda p: type('U', (), dict(free=1000)))
    with pytest.raises(DataError, match='unpacks to more than the 1,000 bytes that are free'): unpack(a, tmp_path/'new', progress=False)
    assert left(tmp_path) == ['a.tar', 'out']

# ---- download

def archive_of(folder: Path, path: Path, top: str = '') -> Path:
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as z:
            for p in sorted(folder.rglob('*')): z.write(p, Path(top)/p.relative_to(folder))
    else:
        with tarfile.open(path, 'w') as t:
            for p in sorted(folder.iterdir()): t.add(p, Path(top)/p.name)
    return path

@pytest.mark.parametrize('name, make, file, top', [('visa', visa, 'VisA_20220922.tar', ''), ('btad', btad, 'btad.zip', 'BTech_Dataset_transformed')])
def test_download_over_a_bad_line(tmp_path, name, make, file, top):
    source = make(tmp_path/'source')
    blob = archive_of(source, tmp_path/file, top).read_bytes()
    with server(lambda h, a, n: h.whole(a, len(blob)//3 + 1), blob) as (url, seen), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        folder = download(name, tmp_path/'data', url=url, sha256=hashlib.sha256(blob).hexdigest(), progress=False)
        assert len(seen) == 3
        assert download(name, tmp_path/'data') == folder and len(seen) == 3                  # found, not fetched
    said = [str(w.message) for w in said]
    assert 'not the published one' in said[0] and 'not the published number of images' in said[1]
    assert folder == tmp_path/'data'/name and left(tmp_path/'data') == [name]
    want = lambda p: {q.relative_to(p).as_posix(): q.read_bytes() for q in p.rglob('*') if q.is_file()}
    assert want(folder) == want(source)
    c = sorted(PUBLISHED[name])[0] if name == 'visa' else '03'
    assert open_dataset(folder, category=c).fingerprint == open_dataset(source, category=c).fingerprint

def test_download_takes_an_archive_of_this_machine_and_checks_it(tmp_path, monkeypatch):
    a = archive_of(btad(tmp_path/'source'), tmp_path/'b.zip')
    with pytest.raises(DataError, match=rf'b\.zip: has the sha256 [0-9a-f]{{64}}, expected {SOURCES["btad"].sha256}; it is cut off or another file'): download('btad', tmp_path/'d', url=str(a))
    with pytest.raises(DataError, match='none.zip: no such file'): download('btad', tmp_path/'d', url='none.zip')
    with pytest.warns(UserWarning, match='published'): download('btad', tmp_path/'d', url=str(a), sha256=hashlib.sha256(a.read_bytes()).hexdigest(), progress=False)
    assert a.exists() and left(tmp_path/'d') == ['btad']

def test_download_without_an_address_or_a_checksum_tells_the_steps(tmp_path):
    with pytest.raises(DataError, match='mvtec: cannot be fetched by a program .*accept the licence on https://www.mvtec.com'): download('mvtec', tmp_path)
    with pytest.raises(DataError, match='mtd: cannot be fetched by a program .*git clone'): download('mtd', tmp_path)
    with pytest.raises(DataError, match='elpv: .*pip install elpv-dataset'): download('elpv', tmp_path)
    with pytest.raises(DataError, match='mtd: no checksum of its archive is published; give .*--sha256'): download('mtd', tmp_path, url='http://127.0.0.1/x.zip')
    with pytest.raises(DataError, match="'imagenet': no such data set; known are visa, btad, mvtec, mtd, elpv"): download('imagenet', tmp_path)
    (tmp_path/'visa').mkdir()
    with pytest.raises(DataError, match='visa: exists, but is no data set'): download('visa', tmp_path)

def test_every_source_is_complete():
    for s in SOURCES.values(): assert s.licence and s.steps and (s.url is None or (s.url.startswith('https://') and s.size and len(s.sha256) == 64))
