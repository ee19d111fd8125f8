"""Probes agree with scikit-learn and torch, and choose nothing by test images."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hvp_ray.errors import ConfigError, DataError, ShapeError
from hvp_ray.evaluation.knn import FEW_SHOT_DRAWS, draw_shots
from hvp_ray.evaluation.linear import (
    ProbeData,
    few_label_probe,
    hold_out,
    linear_probe,
    logistic_probe,
)

Arrays = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _clusters(generator: np.random.Generator, *, spread: float = 1.0, num_train: int = 300) -> Arrays:
    """Return features, labels, test features and test labels of four clouds in eight dimensions."""
    centres = generator.normal(size=(4, 8)) * 1.2
    labels, truth = np.arange(num_train) % 4, generator.integers(0, 4, 200)
    features = centres[labels] + generator.normal(size=(num_train, 8)) * spread
    test_features = centres[truth] + generator.normal(size=(200, 8)) * spread
    return tuple(torch.from_numpy(array) for array in (features, labels, test_features, truth))  # type: ignore[return-value]


def test_sgd_probe_agrees_with_logistic_regression(generator: np.random.Generator) -> None:
    arrays = _clusters(generator, spread=1.2)
    probe = linear_probe(ProbeData(*arrays), epochs=300, learning_rates=(0.3,))
    features, labels, test_features, truth = (array.numpy() for array in arrays)
    # No weight decay: the unpenalised optimum, which exists because the clouds overlap.
    oracle = LogisticRegression(C=1e6, max_iter=5000).fit(features, labels)
    assert 0.6 < probe.accuracy < 0.99
    assert probe.accuracy == pytest.approx(oracle.score(test_features, truth), abs=0.02)
    expected = oracle.coef_.T - oracle.coef_.T.mean(axis=1, keepdims=True)
    weights = (probe.weights - probe.weights.mean(dim=1, keepdim=True)).numpy()
    assert np.linalg.norm(weights - expected) < 0.1 * np.linalg.norm(expected)


def test_sgd_probe_equals_torch_optimizer_step_by_step(generator: np.random.Generator) -> None:
    features, labels, test_features, truth = _clusters(generator)
    probe = linear_probe(
        ProbeData(features, labels, test_features, truth),
        epochs=4,
        learning_rates=(0.5,),
        images_per_step=len(features),
    )
    initial = linear_probe(ProbeData(features, labels, test_features, truth), epochs=1, learning_rates=(1e-30,))
    layer = torch.nn.Linear(8, 4).double()
    with torch.no_grad():
        layer.weight.copy_(initial.weights.T)
        layer.bias.zero_()
    assert initial.weights.std() == pytest.approx(0.01, rel=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5 * len(features) / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(features), labels).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(probe.weights, layer.weight.detach().T)
    torch.testing.assert_close(probe.bias, layer.bias.detach())


def test_rates_trained_together_equal_rates_trained_alone(generator: np.random.Generator) -> None:
    arrays = _clusters(generator)
    together = linear_probe(ProbeData(*arrays), epochs=5, learning_rates=(1e-4, 0.1, 10.0))
    assert len(together.held_out_accuracies) == 3
    alone = linear_probe(ProbeData(*arrays), epochs=5, learning_rates=(together.learning_rate,))
    assert alone.held_out_accuracies == ()
    torch.testing.assert_close(together.weights, alone.weights)
    best = max(together.held_out_accuracies)
    assert together.held_out_accuracies[(1e-4, 0.1, 10.0).index(together.learning_rate)] == best


def test_probes_are_deterministic_and_leave_the_global_generators_alone(generator: np.random.Generator) -> None:
    arrays = _clusters(generator)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    first, second = linear_probe(ProbeData(*arrays), epochs=3), linear_probe(ProbeData(*arrays), epochs=3)
    few = (
        few_label_probe(ProbeData(*arrays), shots=2, num_draws=2),
        few_label_probe(ProbeData(*arrays), shots=2, num_draws=2),
    )
    assert torch.equal(first.weights, second.weights)
    assert np.array_equal(few[0].correct, few[1].correct)
    assert not torch.equal(first.weights, linear_probe(ProbeData(*arrays), epochs=3, seed=1).weights)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


def test_test_images_influence_nothing_that_is_chosen(generator: np.random.Generator) -> None:
    features, labels, test_features, truth = _clusters(generator)
    other_truth = truth[torch.from_numpy(generator.permutation(len(truth)))]
    first = linear_probe(ProbeData(features, labels, test_features, truth), epochs=5)
    second = linear_probe(ProbeData(features, labels, test_features * -3.0, other_truth), epochs=5)
    assert first.learning_rate == second.learning_rate
    assert first.held_out_accuracies == second.held_out_accuracies
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.bias, second.bias)
    assert first.accuracy != second.accuracy
    one = logistic_probe(ProbeData(features, labels, test_features, truth))
    two = logistic_probe(ProbeData(features, labels, test_features * -3.0, other_truth))
    assert one.inverse_regularisation == two.inverse_regularisation
    assert one.held_out_accuracies == two.held_out_accuracies


def test_logistic_probe_equals_scikit_learn(generator: np.random.Generator) -> None:
    arrays = _clusters(generator)
    features, labels, test_features, truth = (array.numpy() for array in arrays)
    probe = logistic_probe(ProbeData(*arrays), inverse_regularisations=(3.0,))
    mean = features.mean(axis=0)
    scale = np.sqrt(((features - mean) ** 2).sum(axis=1).mean())
    # Moving and scaling the features is the same as another C: 3 / scale^2 on the features as they are.
    oracle = LogisticRegression(C=3.0 / scale**2, max_iter=5000, tol=1e-8).fit(features, labels)
    assert np.array_equal(probe.correct, oracle.predict(test_features) == truth)
    assert probe.accuracy == oracle.score(test_features, truth)
    assert probe.has_converged
    swept = logistic_probe(ProbeData(*arrays))
    assert max(swept.held_out_accuracies) > min(swept.held_out_accuracies)


def test_logistic_probe_does_not_depend_on_offset_and_scale_of_the_features(generator: np.random.Generator) -> None:
    features, labels, test_features, truth = _clusters(generator)
    one = logistic_probe(ProbeData(features, labels, test_features, truth))
    two = logistic_probe(ProbeData(features * 64 + 8, labels, test_features * 64 + 8, truth))
    assert one.inverse_regularisation == two.inverse_regularisation
    assert (one.correct == two.correct).mean() > 0.98


def test_few_label_probe_is_logistic_regression_on_the_draws(generator: np.random.Generator) -> None:
    features, labels, test_features, truth = arrays = _clusters(generator)
    probe = few_label_probe(ProbeData(*arrays), shots=5, num_draws=3)
    assert probe.correct.shape == (3, 200)
    mean = features.mean(dim=0)
    scale = (features - mean).square().sum(dim=1).mean().sqrt()
    for draw in range(3):
        rows = draw_shots(labels.numpy(), 5, draw)
        assert np.bincount(labels[rows].numpy()).tolist() == [5, 5, 5, 5]
        oracle = LogisticRegression(C=100.0, max_iter=5000).fit(((features - mean) / scale)[rows], labels[rows])
        expected = oracle.predict((test_features - mean) / scale) == truth.numpy()
        assert (probe.correct[draw] == expected).mean() > 0.99
    assert probe.accuracy == pytest.approx(probe.draw_accuracies.mean())
    assert probe.accuracy == pytest.approx(probe.mean_correct.mean())
    assert few_label_probe(ProbeData(*arrays), shots=1).correct.shape[0] == FEW_SHOT_DRAWS


def test_more_labels_help(generator: np.random.Generator) -> None:
    arrays = _clusters(generator, spread=1.5)
    accuracies = [few_label_probe(ProbeData(*arrays), shots=shots, num_draws=10).accuracy for shots in (1, 5, 20)]
    assert accuracies == sorted(accuracies)


@pytest.mark.parametrize("counts", [[1, 2, 30], [1, 1, 2], [100, 50, 7]])
def test_held_out_part_takes_from_every_class_that_can_spare_one(counts: list[int]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))
    kept, held_out = hold_out(labels, 0.1)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    expected = [0 if count == 1 else max(1, round(0.1 * count)) for count in counts]
    assert np.bincount(labels[held_out], minlength=3).tolist() == expected
    assert set(labels[kept]) == set(labels)
    assert np.array_equal(held_out, hold_out(labels, 0.1)[1])


def test_class_of_the_test_images_only_is_wrong_but_no_error(generator: np.random.Generator) -> None:
    features, labels, test_features, truth = _clusters(generator)
    unseen = torch.full_like(truth, 7)
    assert linear_probe(ProbeData(features, labels, test_features, unseen), epochs=1).accuracy == 0.0
    assert (
        logistic_probe(ProbeData(features, labels, test_features, unseen), inverse_regularisations=(1.0,)).accuracy
        == 0.0
    )


def test_wrong_input_says_what_was_expected(generator: np.random.Generator) -> None:
    features, labels, test_features, truth = arrays = _clusters(generator)
    with pytest.raises(ShapeError, match="leave unlabelled"):
        linear_probe(ProbeData(features, labels - 1, test_features, truth))
    with pytest.raises(ShapeError, match="got 0"):
        logistic_probe(ProbeData(features, labels, test_features[:0], truth[:0]))
    with pytest.raises(ConfigError, match="positive"):
        linear_probe(ProbeData(*arrays), learning_rates=(0.1, -1.0))
    with pytest.raises(ConfigError, match="epochs=0"):
        linear_probe(ProbeData(*arrays), epochs=0)
    with pytest.raises(ConfigError, match="held_out_fraction"):
        linear_probe(ProbeData(*arrays), held_out_fraction=1.0)
    with pytest.raises(DataError, match="no class has two"):
        linear_probe(ProbeData(features[:4], labels[:4], test_features, truth))
    with pytest.raises(DataError, match="one class"):
        logistic_probe(ProbeData(features, labels * 0, test_features, truth))
