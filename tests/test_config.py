import json

import pytest
from hypothesis import given, strategies as st

from dynad.config import PRESETS, Config, ConfigError, content_key, dump_config, load_config, make_config, parse_config, parse_overrides


@pytest.mark.parametrize('key, value, words', [
    ('reconstruction.eta', -1, ['reconstruction.eta = -1', 'greater than or equal to 0']),
    ('reconstruction.eta', 'much', ["reconstruction.eta = 'much'", 'float']),
    ('reconstruction.omega', 1.5, ['reconstruction.omega = 1.5', 'less than or equal to 1']),
    ('latents.kind', 'vae', ["latents.kind = 'vae'", "'tiny'", "'kl-f8'"]),
    ('nonsense.key', 1, ['nonsense', 'allowed: one of preset, seed']),
    ('reconstruction.tmax', 80, ['reconstruction.tmax = 80', 'allowed: one of t_max']),
    ('data.image_size', 100, ['data.image_size = 100', 'multiple of 32']),
    ('reconstruction.t_max', 2000, ['reconstruction.t_max = 2000 is larger than diffusion.T = 1000']),
    ('denoiser.epochs', 3, ['denoiser.epochs and denoiser.steps: exactly one']),
    ('fusion.layers', [2, 4], ['fusion.layers.1 = 4']),
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
