"The method interface: what a newcomer writes is one class, and everything else takes it."
import json

import pytest
import torch

from dynad.accumulator import KEYS
from dynad.config import ConfigError, Settings, make_config
from dynad.data import load_images, to_float
from dynad.detector import DynAD
from dynad.evaluate import evaluate, metrics_table
from dynad.method import METHODS, Method, Prediction, import_methods, method_named, open_run, register
from dynad.report import write_report
from dynad.store import StoreError, load_tensors

class DeviationOptions(Settings):
    power: float = 1.

@pytest.fixture(scope='module', autouse=True)
def deviation():
    "A whole method in a dozen lines, registered while these tests run."
    @register
    class Deviation(Method):
        name, title, Options = 'deviation', 'pixel deviation (toy)', DeviationOptions

        def train(self, hooks):
            x = lambda: to_float(self.training_set.images)
            make = lambda work: {'mean': x().mean(0), 'std': x().std(0) + .05}
            stages = {'pixels': self.training_set.store.stage('deviation', dict(images=self.training_set.key), make)}
            self.load(stages)
            return stages

        def load(self, stages): self.stats = load_tensors(stages['pixels']/'data.safetensors')

        def predict_batch(self, images, rows):
            m = ((images - self.stats['mean']).abs()/self.stats['std']).pow(self.options.power).mean(1, keepdim=True)
            return Prediction(m.flatten(1).amax(1), m)
    yield Deviation
    del METHODS['deviation']

@pytest.fixture(scope='module')
def fitted(deviation, boards, tmp_path_factory):
    run = tmp_path_factory.mktemp('deviation')/'run'
    return deviation(make_config('smoke')).fit(boards, run, progress=False), run

def test_the_methods_of_the_package_are_found():
    assert {'dynad', 'patchcore'} <= set(import_methods()) and method_named('dynad') is DynAD
    with pytest.raises(ConfigError, match='method = .padimm. is not known, did you mean padim.; there are .*patchcore'): method_named('padimm')

def test_fit_open_and_predict(fitted, boards):
    method, run = fitted
    again = open_run(run, progress=False)
    assert type(again) is type(method) and again.decision == method.decision
    p = again.predict([s.image for s in boards.test])
    assert p.map.shape == p.mask.shape == (len(boards.test), 1, 64, 64) and p.anomalous.dtype == torch.bool
    x = to_float(load_images(boards.test[:3], 64))
    torch.testing.assert_close(again.predict(x).score, p.score[:3])

def test_predictions_of_a_set_are_kept(fitted, boards):
    method, run = fitted
    images = method.test_images(boards.test, boards)
    first = Prediction.concatenated([p for _, p in method.predict_set(images)])
    other = open_run(run, progress=False)
    other.predict_batch = None # not called: all of it is in the store
    again = Prediction.concatenated([p for _, p in other.predict_set(other.test_images(boards.test, boards))])
    assert torch.equal(first.map, again.map) and torch.equal(first.score, again.score)
    part = Prediction.concatenated([p for _, p in other.predict_set(images, [4, 2])])
    assert torch.equal(part.map, first.map[[4, 2]])

def test_options_belong_to_the_method(fitted, deviation):
    _, run = fitted
    with pytest.raises(ConfigError, match=r'options.power = .high.*there are power'): deviation(make_config('smoke', {'options': {'power': 'high'}}))
    with pytest.raises(ConfigError, match='options: cannot be changed on a fitted run'): open_run(run, {'options': {'power': 2.}})

def test_evaluation_table_and_report_take_it(fitted, boards, smoke, tmp_path):
    method, _ = fitted
    e = evaluate(method, boards, n_boot=20, progress=False)
    assert set(KEYS) <= set(e.result) and e.result['method'] == 'deviation' and set(e.result['null_models']) == {'one_map_for_all'}
    assert list(metrics_table(e.result).index) == ['pixel deviation (toy)', 'null: one map for all']
    page = write_report(e, tmp_path/'page')
    assert 'pixel deviation (toy)' in page.read_text(encoding='utf-8') and json.loads((tmp_path/'page'/'result.json').read_text())['i_auroc'] == e.result['i_auroc']
    beside = evaluate(smoke[0], boards, n_boot=0, null_models=False, baselines=[method], progress=False).result
    assert beside['baseline']['deviation']['pro']['value'] == pytest.approx(e.result['pro']['value'])

def test_runs_of_another_method_and_of_before(fitted, tmp_path, smoke):
    _, run = fitted
    with pytest.raises(ConfigError, match='a run of the method deviation, not dynad'): DynAD.open(run)
    for name in ('config.json', 'run.json'): (tmp_path/name).write_text((smoke[1]/name).read_text())
    info = json.loads((tmp_path/'run.json').read_text())
    del info['format'], info['version']
    (tmp_path/'run.json').write_text(json.dumps(info))
    with pytest.raises(StoreError, match=r'made by dynad 0.1 \(format 1\).*run `dynad fit` again'): open_run(tmp_path)
