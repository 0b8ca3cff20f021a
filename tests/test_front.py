"The front door without a browser: what is named, what is refused, what stands in the tabs, one schema for results."
import json, re, stat, subprocess, sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dynad.cli import app
from dynad.output import prediction_rows, row_lines, write_predictions
from dynad.server import FrontError, check_port, free_port, page_notebook, place_of, write_page
from dynad.symbols import SYMBOLS, symbol_html

NBS = Path(__file__).parent.parent/'nbs'

def test_what_is_named(tmp_path, smoke, boards):
    assert place_of(None).kind == 'demo' and place_of(smoke[1]).kind == 'run' and place_of(boards.root).kind == 'images'
    (tmp_path/'own').mkdir(); (tmp_path/'own'/'own_images.json').write_text('{}')
    assert place_of(tmp_path/'own').kind == 'own'
    (tmp_path/'cut'/'stages').mkdir(parents=True); (tmp_path/'cut'/'config.json').write_text('{}')
    for path, text in ((tmp_path/'none', 'no such folder; name a run'), (tmp_path/'own'/'own_images.json', 'a file, not a folder'), (tmp_path/'cut', 'its fit is not finished')):
        with pytest.raises(FrontError, match=text): place_of(path)
    (tmp_path/'empty').mkdir(); (tmp_path/'empty'/'.hidden').touch()
    assert place_of(tmp_path/'empty').kind == 'own'                    # a workplace to be filled
    (tmp_path/'empty'/'notes.txt').touch()
    with pytest.raises(FrontError, match='no run and no image in there'): place_of(tmp_path/'empty')

def test_refused_before_anything_slow(tmp_path):
    for words, text in ((['open', str(tmp_path/'none')], 'no such folder'), (['open', '--keep', str(Path(__file__)), '--no-browser'], '--keep')):
        out = CliRunner().invoke(app, words)
        assert out.exit_code == 2 and text in out.output, out.output
    code = f"import sys; from dynad.server import place_of\ntry: place_of({str(tmp_path/'none')!r})\nexcept ValueError: print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'False'

def test_a_taken_port_and_the_token(tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        with pytest.raises(FrontError, match='--port .*: cannot be used'): check_port(s.getsockname()[1])
    command = write_page(tmp_path, place_of(None), tmp_path/'keep', free_port(), 'secret-token')
    assert 'secret-token' not in ' '.join(command) and stat.S_IMODE((tmp_path/'voila.json').stat().st_mode) == 0o600
    voila = json.loads((tmp_path/'voila.json').read_text())['Voila']
    assert voila['ip'] == '127.0.0.1' and voila['token'] == 'secret-token'
    compile(json.loads(page_notebook(place_of(None), tmp_path/"it's"))['cells'][0]['source'], 'page', 'exec')

def test_one_schema_of_results(smoke, boards, tmp_path):
    import csv
    from dynad.inspection import write_results
    method, files = smoke[0], [s.image for s in boards.test[:3]]
    rows = write_predictions(method, files, tmp_path/'a')
    widget = list(csv.DictReader(write_results(method.predict(files), files, tmp_path/'b', method).open()))
    assert list(rows[0]) == list(widget[0]) == [*prediction_rows(method, method.predict(files), files)[0], 'files']
    assert [f'{float(r["score"]):.5f}' for r in widget] == [f'{r["score"]:.5f}' for r in rows]
    lines = row_lines(rows, 2)
    assert len(lines) == 4 and '1 with lower scores' in lines[-1] and f"{max(r['score'] for r in rows):9.3f}" in lines[1]
    far = row_lines([rows[0] | {'doubt': 'unlike the training images'}])
    assert '⚠ unlike the training images' in far[1]

def test_the_word_elpv(tmp_path, monkeypatch):
    "Opens what `dynad demo --data elpv` has made, says how to make it, and under which licence; a folder of that name is a folder."
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FrontError, match='`dynad demo --data elpv` makes it once.*CC BY-NC-SA 4.0'): place_of('elpv')
    run = tmp_path/'dynad_demo'/'run_elpv'
    run.mkdir(parents=True); (run/'run.json').touch()
    assert place_of('elpv') == place_of(Path('elpv')) and place_of('elpv').kind == 'run' and place_of('elpv').path == run
    (tmp_path/'elpv').mkdir()
    assert place_of('elpv').path == tmp_path/'elpv'

def test_a_run_on_a_part_of_a_data_set_opens_with_that_part(boards, tmp_path):
    "As `dynad demo` fits a part of a large set: the images at hand, and those to learn from, are found again."
    from dynad.config import make_config
    from dynad.data import open_dataset
    from dynad.learning import give_pixels
    from dynad.method import fitted_dataset, open_run
    from dynad.patchcore import PatchCore
    part = open_dataset(boards.root).limited(12, 6, 3)
    PatchCore(make_config('smoke')).fit(part, tmp_path/'run', progress=False)
    method = open_run(tmp_path/'run', progress=False)
    again = fitted_dataset(method.info, method.config)
    assert again.fingerprint == part.fingerprint and again.name == part.name and len(again.test) == 6
    give_pixels(method, again)
    assert method.held_out_set.images.shape[0] == len(method.held_out_set)

def test_the_licence_of_elpv_is_said():
    pytest.importorskip('elpv_dataset')
    from dynad.data import open_dataset
    data = open_dataset('elpv', category='mono').limited(20, 6)
    assert 'CC BY-NC-SA 4.0' in data.remark and 'CC BY-NC-SA 4.0' in data.line()

def test_tabs(smoke, boards, tmp_path):
    from dynad.front import open_app
    app = open_app(smoke[1], tmp_path)
    app.wait(200)
    assert app.message.value == '' and app.tabs.titles == ('Your images', 'Explorer', 'Report') and app.tabs.selected_index == 1
    assert app.slot.children == (app.explorer.ui,) and not app.reports.make_button.disabled
    app.explorer.add_tab('Another', app.own.progress)
    assert app.explorer.tabs.titles == ('Inspect', 'Maps and sliders', 'Decide', 'Verdict', 'Another')
    app.close()
    app = open_app(boards.root/'train', tmp_path, preset='smoke')
    assert app.own.normal.folder.value == str((boards.root/'train').resolve()) and app.tabs.selected_index == 0 and app.reports.make_button.disabled
    app.close()

def test_every_symbol_explains_itself():
    for name, s in SYMBOLS.items():
        assert (NBS/f'{s.notebook}.ipynb').is_file() and len(s.sentence) > 40 and s.sentence.endswith('.')
        assert '<math' in symbol_html(name) and f'{s.notebook}.ipynb' in symbol_html(name)

def test_a_report_is_made_beside_the_sliders(smoke, monkeypatch, tmp_path):
    "The session's lock is free while the test images are evaluated; a model that the run does not open as is held."
    import threading
    import dynad.report_view as rv
    from dynad.session import Session
    begun, ended = threading.Event(), threading.Event()
    def slowly(*a, **k):
        begun.set(); e = evaluate(*a, **k); ended.set(); return e
    evaluate = rv.evaluate
    monkeypatch.setattr(rv, 'evaluate', slowly)
    w = rv.ReportView(tmp_path); w.show(s := Session(smoke[1]))
    w.make()
    assert begun.wait(120)
    with s.lock: assert not ended.is_set()
    w.wait(200); w.close()
    assert ended.is_set() and (w.folder/'index.html').is_file() and not w.message.value
    s.use(s.model.with_settings({'fusion.lam': .3}))
    assert rv.model_beside(s) == (s.model, s.lock)

def test_a_report_opens_images_large(smoke, boards, tmp_path):
    from dynad.evaluate import evaluate
    from dynad.report import write_report
    page = write_report(evaluate(smoke[0], boards, n_boot=0, null_models=False, progress=False), tmp_path/'r', n=3).read_text()
    ids = re.findall(r'id="(large-[^"]+)"', page)
    assert len(ids) == len(set(ids)) > 10 and set(re.findall(r'href="#(large-[^"]+)"', page)) == set(ids)
    assert {f'image-{k}' for k in re.findall(r'id="image-(\d+)"', page)} >= set(re.findall(r'href="#(image-\d+)"', page))
