"""What is measured of a GAN while it trains, the verdicts on it, and the stopping rule."""

import math

import pytest
import torch
from fastgan.benchmarks import quality_modes

from fastgan.errors import InputError
from fastgan.metrics.health import Health, StoppingRule, Vitals


def points(n=40, dims=6, seed=0):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def by_hand(real, fake):
    """The definitions, a pair at a time."""

    def distance(a, b):
        return math.dist(a.tolist(), b.tolist())

    n = len(real)
    among = {
        name: [[distance(x[i], x[j]) for j in range(n) if j != i] for i in range(n)]
        for name, x in (("real", real), ("fake", fake))
    }
    mean = {name: sum(map(sum, rows)) / (n * (n - 1)) for name, rows in among.items()}
    nearest = [sorted(row) for row in among["real"]]
    covered = [
        min(distance(real[i], y) for y in fake) <= max(nearest[i][4], mean["real"] / 4)
        for i in range(n)
    ]
    close = 0.1 * sum(row[0] for row in nearest) / n
    duplicates = [min(row) < close for row in among["fake"]]
    return [mean["fake"] / mean["real"], sum(covered) / n, sum(duplicates) / n]


def test_vitals_are_what_they_say():
    real, fake = points(), points(seed=1) * 0.7
    fake[:6] = fake[7] + 1e-4 * points(6)
    got = Vitals().measure(real, fake)
    assert got.tolist() == pytest.approx(by_hand(real, fake), rel=1e-5)
    assert 0.0 < got[1] < 1.0 and got[2] == pytest.approx(7 / 40)


def test_real_images_held_against_real_ones_are_healthy():
    pairs = [(points(64, seed=i), points(64, seed=100 + i)) for i in range(20)]
    got = torch.stack([Vitals().measure(real, fake) for real, fake in pairs])
    spread, coverage, duplicates = got.mean(dim=0).tolist()
    assert spread == pytest.approx(1.0, abs=0.05) and duplicates == 0.0
    # Each of five nearest is as likely a sample's as a real image's: 1 - 2^-5.
    assert coverage == pytest.approx(1 - 2**-5, abs=0.02)


def test_one_image_made_again_and_again():
    real = torch.rand(32, 3, 64, 64) * 2 - 1
    spread, coverage, duplicates = Vitals().measure(real, real[:1].expand(32, -1, -1, -1)).tolist()
    assert spread < 1e-3 and duplicates == 1.0 and coverage < 0.3
    assert all(map(math.isnan, Vitals().measure(real[:2], real[:2]).tolist()))


def row(**values):
    usual = {
        "loss_d": 1.0,
        "loss_g": 1.0,
        "accuracy_real": 0.8,
        "accuracy_fake": 0.8,
        "gradient_d": 1.0,
        "gradient_g": 1.0,
        "spread": 1.0,
        "coverage": 0.9,
        "duplicates": 0.0,
    }
    return {**usual, **values}


def verdict(steps=600, **values):
    health = Health()
    for step in range(1, steps + 1):
        unmeasured = {} if step % 10 == 1 else dict.fromkeys(("spread", "coverage"), math.nan)
        health.add(step, row(**values) | unmeasured)
    return health.verdict()


@pytest.mark.parametrize(
    ("values", "state", "reason"),
    [
        ({}, "healthy", ""),
        ({"spread": 0.3}, "collapsing", "samples vary 0.30 times as much as real images"),
        ({"coverage": 0.1}, "collapsing", "10% of real images have a sample near them"),
        ({"duplicates": 0.8}, "collapsing", "80% of samples have a near duplicate"),
        ({"accuracy_real": 1.0, "accuracy_fake": 1.0}, "D too strong", "right about 100.0%"),
        ({"accuracy_real": 0.4, "accuracy_fake": 0.1}, "G too strong", "right about 25%"),
        ({"loss_g": math.inf}, "diverged", "loss_g was inf at step 600"),
        ({"loss_d": math.nan}, "diverged", "loss_d was nan at step 600"),
        ({"gradient_d": 1e6}, "diverged", "gradient_d was 1e"),
    ],
)
def test_verdicts_and_their_reasons(values, state, reason):
    found = verdict(**values)
    assert found.state == state and reason in str(found)
    assert found.bad == (state != "healthy")


def test_there_is_no_verdict_while_it_begins():
    assert verdict(steps=200, spread=0.0).state == "starting"


def test_a_verdict_is_on_the_window_alone_and_a_critic_may_win():
    health = Health(scores_compared=False)
    for step in range(1, 1001):
        health.add(step, row(spread=0.1 if step <= 700 else 1.0, accuracy_real=1.0))
        if step == 700:
            assert health.verdict().state == "collapsing"
    assert health.verdict().state == "healthy"


def test_health_goes_on_from_its_state():
    health, resumed = Health(), Health()
    for step in range(1, 400):
        health.add(step, row(spread=0.4))
    resumed.load_state_dict(health.state_dict())
    for step in range(400, 500):
        for each in (health, resumed):
            each.add(step, row(spread=0.9))
    assert health.verdict() == resumed.verdict() and health.median("spread") == 0.65
    assert health.state_dict() == resumed.state_dict()
    resumed.restart()
    assert resumed.verdict().state == "starting"


def stopped_at(accuracy=0.5, spreads=(1.0,), metrics=(9, 8, 7, 7.5, 7.6, 7.4, 7.8, 7.9)):
    rule = StoppingRule(patience=3)
    for i, metric in enumerate(metrics):
        health = Health()
        values = {"accuracy_real": accuracy, "accuracy_fake": accuracy}
        for step in range(1000):
            health.add(step, row(**values, spread=spreads[i % len(spreads)]))
        if rule.add(1000 * i, metric, health):
            assert "7 of step 2000" in rule.reason
            return i
    return None


def test_stopping_takes_all_three():
    assert stopped_at() == 5
    assert stopped_at(accuracy=0.9) is None
    assert stopped_at(spreads=(1.0, *[0.6] * 7)) is None
    assert stopped_at(spreads=(0.1,)) is None
    assert stopped_at(metrics=(9, 8, 7, 6, 5, 4, 3, 2)) is None


def test_the_stopping_rule_goes_on_from_its_state():
    rule, resumed = StoppingRule(), StoppingRule()
    for step, metric in enumerate([5.0, 4.0, 6.0]):
        rule.add(step, metric, Health())
    resumed.load_state_dict(rule.state_dict())
    assert resumed.state_dict() == rule.state_dict() and resumed._since == 1


@pytest.mark.parametrize("settings", [{"every": 0}, {"window": 0}, {"grace": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))}=0 must be at least 1"):
        (Vitals if "every" in settings else Health)(**settings)


@pytest.mark.parametrize(
    ("settings", "collapses"),
    [(quality_modes.HEALTHY, False), (quality_modes.COLLAPSING, True)],
    ids=["healthy", "collapsing"],
)
def test_a_collapse_is_noticed_and_a_healthy_run_is_let_be(settings, collapses):
    """One seed; ``quality_modes`` takes ten."""
    found = quality_modes.called_collapsing(quality_modes.ring(), 0, settings)
    assert (found is not None) == collapses
