"200 command lines with one mistake each, by a seeded generator: one line that names it, exit status 2, no traceback, and no file anywhere."
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dynad.cli import app
from dynad.config import PRESETS, Config, dump_config, make_config, setting_names

N = 200
PAPERS = Path(__file__).parent.parent/'nbs'/'papers'

def image(path, value=120):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(path)

def things(root: Path) -> dict[str, Path]:
    "A data set, a run that is not finished, and places that cannot take a result."
    for i in range(3): image(root/f'data/train/good/{i}.png', 100 + i)
    image(root/'data/test/good/0.png'); image(root/'data/test/spot/0.png', 30)
    (root/'run/stages').mkdir(parents=True); (root/'run/config.json').write_text(dump_config(make_config('smoke')))
    (root/'foreign').mkdir(); (root/'foreign/letter.txt').write_text('dear')
    (root/'results').mkdir(); (root/'results/scores.csv').write_text('mine'); (root/'results/index.csv').write_text('mine')
    (root/'empty').mkdir(); (root/'file.txt').write_text('x')
    (root/'damaged').mkdir(); (root/'damaged/config.json').write_text('{')
    return {p.name: p for p in root.iterdir()} | {'image': root/'data/test/spot/0.png'}

def misspelt(rng: random.Random, word: str, allowed) -> str:
    "A word with one letter changed, added or lost."
    while True:
        i, c = rng.randrange(len(word)), rng.choice('qxzj')
        out = rng.choice([word[:i] + c + word[i:], word[:i] + word[i + 1:], word[:i] + c + word[i + 1:]])
        if out.strip() and out not in allowed and not out.startswith('-'): return out

class Lines:
    "Command lines that are right but for one thing; each method of `kinds` gives words, and what the error must say."
    def __init__(self, root, seed):
        self.root, self.t, self.rng = root, things(root), random.Random(seed)

    def commands(self):
        t, new = self.t, self.root/f'new{self.rng.randrange(10**6)}'
        return {'fit': dict(words=['fit'], options={'--data': t['data'], '--out': new, '--preset': 'smoke'}),
                'evaluate': dict(words=['evaluate', t['run']], options={'--data': t['data'], '--json': new/'r.json'}),
                'predict': dict(words=['predict', t['run'], t['image']], options={'--out': new}),
                'demo': dict(words=['demo'], options={'--out': new}),
                'reproduce': dict(words=['reproduce', 'table5'], options={'--out': new}),
                'bench': dict(words=['bench'], options={'--json': new/'r.json', '--preset': 'smoke'}),
                'download': dict(words=['download', 'mtd'], options={'--out': new, '--url': self.root/'none.zip', '--sha256': '0'*64})}

    def line(self, command, **changed):
        c = self.commands()[command]
        options = c['options'] | {f"--{k.replace('_', '-')}": v for k, v in changed.items()}
        out = [str(w) for w in c['words']]
        for k, v in options.items():
            for x in v if isinstance(v, list) else [v]: out += [f'{k}={x}'] if self.rng.random() < .5 or str(x).startswith('-') else [k, str(x)]
        return out

    def folder(self):
        "A place where no folder can be made."
        t = self.t
        places = [(t['file.txt'], 'is a file'), (t['file.txt']/'a'/'b', 'is a file'), (self.root/('n'*self.rng.randint(256, 999)), 'shorten it'), ('', 'empty'), ('~/'*2 + 'w'*300, 'shorten it')]
        if os.path.isdir('/proc/self'): places.append((f'/proc/none{self.rng.randrange(99)}', 'cannot be written'))
        return self.rng.choice(places)

    def file(self):
        "A place where no file can be made."
        place, said = self.folder() if self.rng.random() < .7 else (self.rng.choice([self.t['empty'], self.t['data'], self.root]), 'is a folder')
        return (place, said) if said != 'is a file' else (self.t['file.txt']/'r.json', said)

    def where_folder(self):
        place, said = self.folder()
        command, option = self.rng.choice([('fit', 'out'), ('predict', 'out'), ('demo', 'out'), ('reproduce', 'out'), ('download', 'out'), ('evaluate', 'save_maps'), ('evaluate', 'report')])
        return self.line(command, **{option: place}), said

    def where_file(self):
        place, said = self.file()
        command, option = self.rng.choice([('evaluate', 'json'), ('evaluate', 'table'), ('bench', 'json')])
        if option == 'table' and said in ('is a file', 'cannot be written', 'shorten it'): place = f'{place}.parquet'
        return self.line(command, **{option: place}), said if option != 'table' or said in ('empty', 'is a folder', 'shorten it', 'cannot be written') else 'file.txt'

    def foreign(self):
        t = self.t
        return self.rng.choice([(self.line('fit', out=t['foreign']), 'holds no run'), (self.line('fit', out=t['data']), 'holds no run'), (self.line('evaluate', report=t['foreign']), 'something else than a report'),
                                (self.line('predict', out=t['results']), 'scores.csv: is there already'), (self.line('evaluate', save_maps=t['results']), 'index.csv: is there already'),
                                (self.line('evaluate', json=t['run']/'config.json'), 'RUN too'), (self.line('evaluate', report=self.root/'p', json=self.root/'p'/'r.json'), 'lies in the folder of --report'),
                                (self.line('evaluate', table=self.root/'scores.csv'), 'ends in .csv'), (self.line('evaluate', save_maps=self.root/'m', report=self.root/'m'), 'lies in the folder of --report'),
                                (self.line('evaluate', table=self.root/'a.parquet', json=self.root/'a.parquet'), 'is the place of')])

    def name(self):
        "A misspelt name of something."
        kind, words = self.rng.choice([('preset', list(PRESETS)), ('layout', ['mvtec', 'visa', 'btad', 'folder']), ('method', ['dynad', 'patchcore']), ('tracker', ['tensorboard', 'mlflow']), ('product', ['board', 'gear', 'weave']),
                                       ('profile', ['smoke', 'small', 'paper']), ('baselines', ['patchcore']), ('estimate', list(PRESETS))])
        word = misspelt(self.rng, self.rng.choice(words), ['auto', *words])
        command = {'product': 'demo', 'profile': 'reproduce', 'baselines': 'evaluate'}.get(kind) or self.rng.choice(['fit', 'bench'] if kind == 'preset' else ['fit'])
        if kind == 'estimate': return ['doctor', '--estimate', word], word
        return self.line(command, **{kind: word}), word

    def target(self):
        word = misspelt(self.rng, self.rng.choice(['table5', 'fig13', 'scale', 'sensitivity']), [f'table{i}' for i in range(1, 10)] + [f'fig{i}' for i in range(1, 16)])
        if self.rng.random() < .5: return ['reproduce', word], word
        word = misspelt(self.rng, self.rng.choice(['visa', 'btad', 'mvtec']), ['visa', 'btad', 'mvtec', 'mtd'])
        return ['download', word, '--out', str(self.root/'d')], word

    def option(self):
        "An option that does not exist, a command that does not, or an argument that is missing."
        command = self.rng.choice([*self.commands()])
        words = self.line(command)
        how = self.rng.randrange(3)
        if how == 0: return [*words, f"--{(w := misspelt(self.rng, 'seed', ['seed', 'set']))}"], w
        if how == 1: return [(w := misspelt(self.rng, command, self.commands())), *words[1:]], w
        return self.rng.choice([(['fit', '--out', 'x'], '--data'), (['fit', '--data', str(self.t['data'])], '--out'), (['evaluate', str(self.t['run']), '--data', str(self.t['data'])], '--json'), (['predict'], 'run'), (['download', 'visa'], '--out')])

    def number(self):
        "A number that is none, too small, or negative."
        command, option, low = self.rng.choice([('fit', 'seed', 0), ('evaluate', 'n_boot', 0), ('bench', 'images', 1), ('bench', 'repeats', 1), ('reproduce', 'workers', 0), ('reproduce', 'timeout', 1), ('demo', 'seed', 0)])
        bad = self.rng.choice([low - self.rng.randint(1, 99), 'many', '1.5', ''])
        return self.line(command, **{option: bad}), f"--{option.replace('_', '-')}"

    def setting(self):
        "A --set that is misspelt, out of range or no pair."
        keys = [k for k in setting_names(Config) if '.' in k]
        key = self.rng.choice(keys)
        wrong = misspelt(self.rng, key.split('.')[1], [k.split('.')[1] for k in keys])
        pair, said = self.rng.choice([(f"{key.split('.')[0]}.{wrong}=1", wrong), (key, key), ('=3', "'=3'"), (f'data.image_size={-32*self.rng.randint(1, 9)}', 'data.image_size'), (f'fusion.lam={self.rng.randint(2, 9)}', 'fusion.lam'),
                                      (f'reconstruction.S=-{self.rng.randint(1, 9)}', 'reconstruction.S'), ('latents.kind=none', 'latents.kind'), ('batch=0', 'batch'), ('device=gpu9', 'device'), (f'{key.split(".")[0]}=3', key.split('.')[0])])
        return self.line(self.rng.choice(['fit', 'evaluate', 'demo', 'bench']), set=[pair]), said

    def data(self):
        "Images that are not there."
        t, none = self.t, self.root/f'none{self.rng.randrange(10**6)}'
        return self.rng.choice([(self.line(c, data=d), said) for c in ('fit', 'evaluate', 'demo') for d, said in ((none, none.name), (t['file.txt'], 'a file, not a folder'), ('', 'empty'), (self.root/('d'*300), 'shorten it'))] +
                               [(self.line('fit', data=t['empty']), 'empty'), (self.line('fit', layout='visa'), 'visa'), (self.line('fit', category='candl'), 'candl'), (self.line('demo', category='mono'), 'mono'), (self.line('demo', product='gear', data=t['data']), 'gear'),
                                (['predict', str(t['run']), str(none), '--out', str(self.root/'o')], none.name), (['predict', str(t['run']), str(t['empty']), '--out', str(self.root/'o')], 'no image'),
                                (['predict', str(none), str(t['image']), '--out', str(self.root/'o')], none.name), (['predict', str(t['damaged']), str(t['image']), '--out', str(self.root/'o')], 'damaged'),
                                (['evaluate', str(none), '--data', str(t['data']), '--json', str(self.root/'r.json')], none.name), (['evaluate', str(t['file.txt']), '--data', str(t['data']), '--json', str(self.root/'r.json')], 'file.txt'),
                                (self.line('download'), 'none.zip'), (self.line('download', sha256='12'), '64 hexadecimal'), (self.line('download', url='ftp://nowhere/a.zip'), 'ftp://nowhere'),
                                (self.line('predict'), 'the run is not finished'), (self.line('evaluate'), 'the run is not finished'), (['bench', str(none), '--json', str(self.root/'b.json')], none.name)])

    def parameter(self):
        "Parameters of a notebook."
        words, said = self.rng.choice([(['-p', 'n_boot', 'many'], 'n_boot'), (['-p', 'seeds', '3'], 'seeds'), (['-p', 'seeds', '[a, b]'], 'seeds'), (['-p', 'n_boot', '1.5'], 'n_boot'), (['-p', 'n_boot', 'None'], 'n_boot'), (['-p', 'data', '7'], '-r data 7'),
                                       (['-p', 'n_boots', '7'], "did you mean 'n_boot'"), (['-p', 'out', 'x'], '--out'), (['-p', 'n_boot'], 'n_boot'), (['-y', '[1, 2]'], 'holds no names'), (['-y', '{a: [1'], 'cannot be read as YAML'),
                                       (['-f', str(self.root/'none.yaml')], 'none.yaml'), (['-f', str(self.t['empty'])], 'empty'), (['-r', 'n_boot', '50'], 'n_boot'), (['-p', '=3'], "'=3'"), (['--json'], 'only with --list')])
        return ['reproduce', str(PAPERS/'table5.ipynb'), '--out', str(self.root/'r'), *words], said

    kinds = ('where_folder', 'where_file', 'foreign', 'name', 'target', 'option', 'number', 'setting', 'data', 'parameter')

    def draw(self):
        kind = self.rng.choice(self.kinds)
        words, said = getattr(self, kind)()
        return kind, words, said

def snapshot(*folders):
    "Every file and folder, with its size."
    return {str(p): p.stat().st_size if p.is_file() else -1 for f in folders for p in f.rglob('*')}

def test_200_bad_command_lines(tmp_path, monkeypatch):
    home, here, root = (tmp_path/n for n in ('home', 'here', 'root'))
    for f in (home, here, root): f.mkdir()
    monkeypatch.setenv('HOME', str(home)); monkeypatch.setenv('USERPROFILE', str(home)); monkeypatch.chdir(here)
    monkeypatch.setenv('DYNAD_POOL', str(here/'pool')); monkeypatch.delenv('DYNAD_DATA', raising=False)
    import matplotlib.font_manager                                                              # writes its cache into the home folder
    lines, run, wrong, kinds = Lines(root, seed=13), CliRunner(), [], Counter()
    before = snapshot(tmp_path)
    for _ in range(N):
        kind, words, said = lines.draw()
        kinds[kind] += 1
        out = run.invoke(app, words)
        text = out.output.strip()
        one = len(text.splitlines()) == 1 and text.startswith('dynad: ')
        left = sorted(set(snapshot(tmp_path).items()) ^ set(before.items()))
        if out.exit_code != 2 or not one or said not in text or left or not (out.exception is None or isinstance(out.exception, SystemExit)):
            wrong.append((kind, words, said, out.exit_code, text[-600:], left, repr(out.exception)))
            before = snapshot(tmp_path)
    assert not wrong, f'{len(wrong)} of {N}:\n' + '\n'.join(map(str, wrong[:12]))
    assert len(kinds) == len(Lines.kinds) and min(kinds.values()) >= 8

def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    import shutil
    from dynad import paths
    t, free = things(tmp_path), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(paths.shutil, 'disk_usage', lambda p: free._replace(free=1000))
    before = snapshot(tmp_path)
    for words in (['predict', t['run'], t['image'], '--out', tmp_path/'o'], ['fit', '--data', t['data'], '--out', tmp_path/'r', '--preset', 'smoke', '--set', 'data.min_holdout=1', '--tracker', 'none']):
        out = CliRunner().invoke(app, [str(w) for w in words])
        assert out.exit_code == 2 and 'but only 0.0 MB are free' in out.output, out.output
        assert out.output.strip().splitlines()[-1].startswith('dynad: ') and snapshot(tmp_path) == before
