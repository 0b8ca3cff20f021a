import json

import pytest
from hypothesis import given, strategies as st

from dynad.config import PRESETS, Config, ConfigError, content_key, dump_config, load_config, make_config, merged, nested, parse_config, with_overrides
from dynad.values import parse_overrides, parse_pairs, parse_value


@pytest.mark.parametrize('key, value, words', [
    ('reconstruction.eta', -1, ['reconstruction.eta = -1', 'greater than or equal to 0']),
    ('reconstruction.eta', 'much', ["reconstruction.eta = 'much'", 'float']),
    ('reconstruction.omega', 1.5, ['reconstruction.omega = 1.5', 'less than or equal to 1']),
    ('latents.kind', 'vae', ["latents.kind = 'vae'", "'tiny'", "'kl-f8'"]),
    ('nonsense.key', 1, ['nonsense', 'allowed: one of preset, method, options, seed']),
    ('reconstruction.tmax', 80, ['reconstruction.tmax = 80', 'allowed: one of t_max']),
    ('data.image_size', 100, ['data.image_size = 100', 'multiple of 32']),
    ('reconstruction.t_max', 2000, ['reconstruction.t_max = 2000 is larger than diffusion.T = 1000']),
    ('denoiser.epochs', 3, ['denoiser.epochs and denoiser.steps: exactly one']),
    ('fusion.layers', [2, -1], ['fusion.layers.1 = -1', 'numbers of layers that the backbone has']),
    ('fusion.layers', [2, 'last'], ["fusion.layers.1 = 'last'"]),
    ('dic.layer', 10, ['dic.layer = 10', 'a layer number j that the backbone has']),
    ('features.backbone', 'resnet43', ["features.backbone = 'resnet43': no backbone of this name; did you mean resnet34", 'any name of timm.list_models()']),
    ('features.backbone', 3, ['features.backbone = 3']),
])
def test_errors_name_key_value_and_what_is_allowed(key, value, words):
    with pytest.raises(ConfigError) as e: make_config('small', {key: value})
    for w in words: assert w in str(e.value)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="preset = 'big' does not exist; allowed: paper, authors, small, smoke"): make_config('big')


@pytest.mark.parametrize('preset', PRESETS)
def test_presets_survive_a_file(preset, tmp_path):
    cfg = make_config(preset, seed=7)
    (tmp_path/'config.json').write_text(dump_config(cfg))
    assert load_config(tmp_path/'config.json') == cfg


def test_the_paper_as_printed():
    p = make_config('paper')
    assert (p.data.image_size, p.features.backbone, p.latents.kind) == (256, 'resnet34', 'kl-f8')
    assert (p.reconstruction.t_max, p.reconstruction.S, p.dic.K, p.dic.bins, p.fusion.lam, p.fusion.sigma) == (80, 10, 20, 10, .85, 4)
    assert (p.denoiser.lr, p.denoiser.weight_decay, p.denoiser.batch, p.denoiser.epochs) == (1e-4, .01, 30, 300)
    assert (p.diffusion.T, p.diffusion.beta_start, p.diffusion.beta_end) == (1000, .0015, .0195)
    assert p.reconstruction.omega == 0 and 7 <= p.reconstruction.eta <= 10 and 0 <= p.adaptation.gamma <= 3


@pytest.mark.parametrize('text, words', [('{"preset": ', 'not JSON'), ('{"seed": -1}', 'seed = -1'), ('{"seed": 4294967296}', 'less than 4294967296'), ('['*100_000, 'not JSON'), ('{"seed": ' + '9'*5000 + '}', 'not JSON')])
def test_a_broken_file_is_named(tmp_path, text, words):
    path = tmp_path/'config.json'
    path.write_text(text)
    with pytest.raises(ConfigError) as e: load_config(path)
    assert str(path) in str(e.value) and words in str(e.value)
    with pytest.raises(ConfigError, match='no such file'): load_config(tmp_path/'none.json')


def test_set_pairs():
    assert parse_overrides(['a.b=1', 'c=x=y', 'd=[1,2]', 'e=null']) == {'a.b': 1, 'c': 'x=y', 'd': [1, 2], 'e': None}
    with pytest.raises(ConfigError, match='expected key=value'): parse_overrides(['eta'])
    with pytest.raises(ConfigError, match=r"-p 'n_boot': expected key=value, e.g. n_boot=50"): parse_pairs(['n_boot'], '-p', 'n_boot=50')
    with pytest.raises(ConfigError, match='expected key=value'): parse_pairs([' =3'])


@pytest.mark.parametrize('text, value', [
    ('4', 4), ('-4', -4), ('+4', 4.), ('.5', .5), ('1.', 1.), ('1e-3', 1e-3), ('2.5', 2.5),
    ('true', True), ('false', False), ('null', None), ('True', True), ('False', False), ('None', None),
    ('[0, 1]', [0, 1]), ('[tile, wood]', ['tile', 'wood']), ("['tile', 'wood']", ['tile', 'wood']), ('[True, null]', [True, None]), ('{"a": 1}', {'a': 1}), ('{a: 1}', {'a': 1}),
    ('taesd', 'taesd'), ('"4"', '4'), ('', ''), ('x=y', 'x=y'), ('[open', '[open'), ('yes', 'yes'), ('2026-11-25', '2026-11-25'), ('1.2.3', '1.2.3'), ('9'*5000, '9'*5000), ('['*100_000, '['*100_000),
])
def test_a_value_is_read_as_json_python_or_yaml_write_it(text, value):
    got = parse_value(text)
    assert got == value and type(got) is type(value)


def test_overrides_of_a_configuration():
    cfg = make_config('small', seed=3)
    other = with_overrides(cfg, {'reconstruction.eta': 4., 'batch': 2})
    assert (other.reconstruction.eta, other.batch, other.seed, other.reconstruction.t_max) == (4., 2, 3, 640) and cfg.batch == 32
    assert with_overrides(cfg, {}) == cfg
    with pytest.raises(ConfigError, match='fusion.lam = 2: .*less than or equal to 1'): with_overrides(cfg, {'fusion.lam': 2})
    with pytest.raises(ConfigError, match='dic.K = 2: dic = 1 is given as a whole beside it'): nested({'dic': 1, 'dic.K': 2})
    base = {'a': {'b': 1, 'c': 2}}
    assert merged(base, {'a': {'b': 3}, 'd': 4}) == {'a': {'b': 3, 'c': 2}, 'd': 4} and base == {'a': {'b': 1, 'c': 2}}


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(Exception, match='frozen'): make_config('small').seed = 1


@given(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(-9, 9), st.text(max_size=5), st.lists(st.integers(0, 3), max_size=3))))
def test_keys_depend_on_content_not_on_order(d):
    shuffled = json.loads(json.dumps(dict(reversed(d.items()))))
    assert content_key(d) == content_key(shuffled)
    assert content_key(d) != content_key({**d, 'more': 1})


@given(st.sampled_from(['reconstruction.eta', 'fusion.lam', 'reconstruction.t_max', 'dic.K', 'latents.kind', 'seed']),
       st.one_of(st.integers(), st.floats(allow_nan=True), st.text(max_size=8), st.none(), st.lists(st.integers(), max_size=2)))
def test_any_value_is_taken_or_refused_with_a_config_error(key, value):
    try: cfg = make_config('small', {key: value})
    except ConfigError as e: assert str(e)
    else: assert isinstance(cfg, Config) and parse_config(json.loads(dump_config(cfg))) == cfg
