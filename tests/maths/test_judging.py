"""Cross-model accuracy, classifier score and Fréchet distance, worked out by hand."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from dreamkit.applications.judge import Judge, check_verifier, metric_names
from dreamkit.errors import DreamkitError, OptionError
from dreamkit.evaluation import fidelity
from dreamkit.evaluation.classifier_score import classifier_score
from dreamkit.evaluation.cross_model import Observed, as_seen_by, observe
from dreamkit.evaluation.features import find_layer, penultimate_layer, pooled
from dreamkit.evaluation.fidelity import check_fidelity, fidelity_scores, weights_path
from dreamkit.evaluation.frechet_distance import Gaussian, frechet_distance
from dreamkit.evaluation.judgement import judge_by
from dreamkit.sources.joined import Joined
from dreamkit.store.dreams import DreamStore
from dreamkit.store.source import Dreams
from dreamkit.types import NO_LABEL, ImageSource, StoredImages, Synthesis, Teacher

CPU = torch.device("cpu")


def gaussian(mean, covariance, count=101):
    scatter = torch.tensor(covariance, dtype=torch.float64) * (count - 1)
    return Gaussian(count, torch.tensor(mean, dtype=torch.float64), scatter)


def diagonal(*variances):
    return [[v if i == j else 0.0 for j in range(len(variances))] for i, v in enumerate(variances)]


# --- Fréchet distance -------------------------------------------------------------------------


def test_frechet_distance_of_diagonal_gaussians():
    # ‖(3, 4)‖² = 25; (1 - 2)² + (2 - 3)² = 2 from the standard deviations.
    first = gaussian([0.0, 0.0], diagonal(1.0, 4.0))
    second = gaussian([3.0, 4.0], diagonal(4.0, 9.0))
    assert frechet_distance(first, second) == pytest.approx(27, abs=1e-10)
    assert frechet_distance(second, first) == pytest.approx(27, abs=1e-10)


def test_frechet_distance_of_covariances_that_do_not_commute():
    # For 2×2 matrices tr(M^½) = sqrt(tr M + 2·sqrt(det M)); M = Σ₁Σ₂ has trace 2·1 + 2·4 = 10
    # and determinant 3·4 = 12.
    first = gaussian([0.0, 0.0], [[2.0, 1.0], [1.0, 2.0]])
    second = gaussian([0.0, 0.0], diagonal(1.0, 4.0))
    expected = 4 + 5 - 2 * math.sqrt(10 + 2 * math.sqrt(12))
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-10)


def test_frechet_distance_to_a_point():
    # All images alike: no covariance, so the other's trace and the means are left.
    point = Gaussian.of(torch.ones(5, 2))
    assert frechet_distance(point, gaussian([0.0, 0.0], diagonal(1.0, 4.0))) == pytest.approx(7)


def test_identical_sets_are_at_no_distance():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    same = Gaussian.of(features)
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-9)
    assert not same.short


def test_fewer_images_than_features():
    # Four images span three of 64 dimensions; 61 eigenvalues are zero but for rounding.
    random = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 64, generator=random) for _ in range(2))
    same = Gaussian.of(first)
    assert same.short
    assert frechet_distance(same, same) == pytest.approx(0, abs=1e-4)
    # The two sets span different spaces; the overlap is the nuclear norm of the product of the
    # centred features.
    a, b = (f.double() - f.double().mean(0) for f in (first, second))
    overlap = torch.linalg.svdvals(a @ b.T).sum() / 3
    shift = (first.double().mean(0) - second.double().mean(0)).square().sum()
    expected = shift + (a.square().sum() + b.square().sum()) / 3 - 2 * overlap
    found = frechet_distance(same, Gaussian.of(second))
    assert found == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("counts", [(1, 3), (3, 1)])
def test_one_image_has_no_covariance(counts):
    first, second = (Gaussian.of(torch.zeros(count, 2)) for count in counts)
    with pytest.raises(DreamkitError, match="at least two images"):
        frechet_distance(first, second)


def test_moments_by_hand():
    found = Gaussian.of(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]]))
    assert found.mean.tolist() == [2.0, 2.0]
    # Variances (4 + 0 + 4)/2 and (1 + 1 + 4)/2; covariance (-2·-1 + 0 + 2·2)/2.
    assert found.covariance.tolist() == [[4.0, 3.0], [3.0, 3.0]]


def test_moments_of_batches_are_those_of_the_whole():
    features = torch.randn(11, 3, generator=torch.Generator().manual_seed(1)).double() * 3 + 5
    joined = Gaussian.of(features[:1]).joined(Gaussian.of(features[1:8]))
    joined = joined.joined(Gaussian.of(features[8:]))
    whole = Gaussian.of(features)
    assert joined.count == 11
    torch.testing.assert_close(joined.mean, whole.mean)
    torch.testing.assert_close(joined.covariance, torch.cov(features.T))


def test_moments_of_features_far_from_zero():
    # In float64 the squares of 1e9 would leave steps of 128; the variance of 0, 2, 4 is 4.
    far = torch.tensor([[0.0], [2.0], [4.0]], dtype=torch.float64) + 1e9
    assert Gaussian.of(far).covariance.item() == 4
    assert Gaussian.of(far[:1]).joined(Gaussian.of(far[1:])).covariance.item() == 4


# --- layers -----------------------------------------------------------------------------------


def test_inputs_are_averaged_over_positions():
    maps = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]], [[0.0, 0.0], [0.0, 8.0]]]])
    assert pooled(nn.Conv2d(2, 2, 1), maps).tolist() == [[4.0, 2.0]]
    tokens = torch.tensor([[[1.0, 10.0], [3.0, 30.0], [5.0, 50.0]]])  # three tokens, two channels
    assert pooled(nn.Linear(2, 2), tokens).tolist() == [[3.0, 30.0]]
    assert pooled(nn.LayerNorm(2), tokens).tolist() == [[3.0, 30.0]]
    rows = torch.tensor([[1.0, 2.0]])
    assert pooled(nn.Linear(2, 2), rows).tolist() == [[1.0, 2.0]]


class HeadFirst(nn.Module):
    """Defines its classifier before the layer it comes after, and one that it never calls."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(3, 4)
        self.unused = nn.Linear(9, 9)

    def forward(self, x):
        return self.head(self.body(x.mean((2, 3))))


def test_the_penultimate_layer_feeds_the_linear_layer_called_last(toys):
    assert penultimate_layer(HeadFirst(), toys.card()) == "head"
    assert penultimate_layer(toys.two_bn(), toys.card()) == "fc"


def test_a_network_without_a_linear_layer_wants_a_name(toys):
    net = toys.conv_head()
    with pytest.raises(DreamkitError, match="calls no linear layer") as caught:
        find_layer(net, toys.card(), None)
    assert caught.value.path == ("layer",)
    assert find_layer(net, toys.card(), "head") == ("head", net.head)


def test_an_unknown_layer(toys):
    with pytest.raises(DreamkitError, match="no module 'conv3'; did you mean 'conv2'") as caught:
        find_layer(toys.two_bn(), toys.card(), "conv3")
    assert caught.value.path == ("layer",)


# --- classifier score -------------------------------------------------------------------------


def score(logits, splits=1, seed=0):
    return classifier_score(torch.as_tensor(logits), splits, torch.Generator().manual_seed(seed))


def one_hot(classes, sure=50.0):
    return nn.functional.one_hot(torch.tensor(classes), 3).float() * sure


def test_a_sure_and_even_set_scores_its_number_of_classes():
    found = score(one_hot([0, 1, 2, 0, 1, 2]))
    assert (found.mean, found.std) == (pytest.approx(3), 0)
    assert (found.images, found.splits) == (6, 1)


def test_a_set_of_one_class_scores_one():
    assert score(one_hot([1, 1, 1])).mean == pytest.approx(1)
    assert score(torch.zeros(4, 5)).mean == pytest.approx(1)


def test_an_unsure_set_by_hand():
    # p = (¾, ¼) and (¼, ¾), p(y) = (½, ½): KL is ¾ ln 1.5 + ¼ ln 0.5 for either.
    log_p = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()
    expected = math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert score(log_p + 7).mean == pytest.approx(expected)  # logits are log p plus anything


def test_splits_are_scored_apart():
    # However four images are dealt into two splits, one has class 0 alone (1), one both (2).
    found = score(one_hot([0, 0, 0, 1]), splits=2, seed=5)
    assert found.mean == pytest.approx(1.5)
    assert found.std == pytest.approx(0.5)


def test_splits_of_uneven_numbers_leave_out_no_image():
    # Five images, two splits: three and two of five classes that are all different.
    found = score(torch.eye(5) * 100, splits=2)
    assert found.mean == pytest.approx((3 + 2) / 2)


def test_sets_sorted_by_class_are_shuffled():
    logits = one_hot([0] * 200 + [1] * 200)
    assert score(logits, splits=2).mean > 1.95  # a split in the order given would score 1


def test_the_seed_decides_the_splits():
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert score(logits, 3, seed=1) == score(logits, 3, seed=1)
    assert score(logits, 3, seed=1) != score(logits, 3, seed=2)


def test_extreme_logits():
    assert score(one_hot([0, 1, 2], sure=1e6)).mean == pytest.approx(3)


def test_fewer_images_than_splits():
    with pytest.raises(DreamkitError, match="3 images cannot make 4 splits") as caught:
        score(torch.zeros(3, 2), splits=4)
    assert caught.value.path == ("splits",)


# --- cross-model ------------------------------------------------------------------------------


def test_images_are_resized_whole_and_normalised_by_the_verifiers_card(toys):
    # Width 2 to 4, bilinear: the pixels' centres lie at 0.25 and 0.75, so 0, ¼, ¾ and 1 of the
    # way; 5 does not round. Then (x/255 - ½)/¼.
    card = toys.card(size=(1, 1, 4))
    found = as_seen_by(card, torch.tensor([[[[0, 5]]]], dtype=torch.uint8))
    pixels = torch.tensor([[[[0.0, 1.25, 3.75, 5.0]]]]) / 255
    torch.testing.assert_close(found, (pixels - 0.5) / 0.25)


def test_making_smaller_is_antialiased(toys):
    # Eight columns become two, centred at 2 and 6. A triangle of half-width 4 around each weighs
    # the columns at 0.5 to 7.5 by 1 - d/4; those inside sum to 3.5. The bright one, at 3.5, has
    # 1 - 1.5/4 and 1 - 2.5/4.
    stored = torch.zeros(1, 1, 1, 8, dtype=torch.uint8)
    stored[..., 3] = 224
    card = toys.card(size=(1, 1, 2), mean=(0.0,), std=(1.0,))
    left, right = (as_seen_by(card, stored) * 255).flatten().tolist()
    assert left == pytest.approx(224 * 0.625 / 3.5)
    assert right == pytest.approx(224 * 0.375 / 3.5)


def test_images_of_the_right_size_are_only_normalised(toys):
    images = toys.images(3)
    assert torch.equal(as_seen_by(toys.card(), images.images), toys.card().normalise(images.images))


def test_other_channels_are_refused(toys):
    with pytest.raises(DreamkitError, match="have 1 channels, toy takes 3"):
        as_seen_by(toys.card(), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))


def test_accuracy_counts_labelled_images_alone():
    logits = one_hot([0, 1, 2, 0])
    assert Observed(logits, torch.tensor([0, 2, NO_LABEL, NO_LABEL])).accuracy == 0.5
    assert Observed(logits, torch.full((4,), NO_LABEL)).accuracy is None


class FirstPixel(nn.Module):
    """Predicts the class that the first pixel of an image holds."""

    def forward(self, x):
        return nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long() % 3, 3).float()


def test_observing_keeps_the_order_over_batches(toys):
    pixels = torch.arange(300).remainder(3).to(torch.uint8).view(-1, 1, 1, 1)
    labels = torch.arange(300) % 3
    labels[:30] = (labels[:30] + 1) % 3  # thirty are wrong
    card = toys.card(size=(1, 1, 1), mean=(0.0,), std=(1.0,))
    done = []
    found = observe(
        toys.teacher(FirstPixel(), card), StoredImages(pixels, labels), CPU, None, done.append
    )
    assert found.accuracy == pytest.approx(0.9)
    assert found.features is None
    assert done == [256, 300]


def test_features_are_the_input_of_the_layer(toys):
    verifier, images = toys.teacher(toys.two_bn()), toys.images(300)
    found = observe(verifier, images, CPU, "conv1").features
    expected = verifier.card.normalise(images.images).mean((2, 3)).double()
    assert found.count == 300
    torch.testing.assert_close(found.mean, expected.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.covariance, torch.cov(expected.T), rtol=0, atol=1e-6)


def test_observing_leaves_the_network_as_it_was(toys):
    model = toys.two_bn().train()
    model.bn1.eval()
    before = toys.state(model)
    found = observe(toys.teacher(model), toys.images(4), CPU, "fc")
    assert found.features.mean.shape == (6,)
    assert not found.logits.requires_grad
    toys.assert_same_state(model, before)


def test_a_layer_that_is_never_called(toys):
    model = toys.two_bn()
    model.unused = nn.Linear(3, 3)
    with pytest.raises(DreamkitError, match="never calls its module 'unused'"):
        observe(toys.teacher(model), toys.images(2), CPU, "unused")


def test_logits_that_are_not_finite(toys):
    model = toys.two_bn()
    nn.init.constant_(model.fc.bias, math.nan)
    with pytest.raises(DreamkitError, match="not finite"):
        observe(toys.teacher(model), toys.images(2), CPU)


def test_a_judgement_of_the_reference_itself(toys):
    verifier, images = toys.teacher(toys.residual()), toys.images(8)
    done = []
    found = judge_by(verifier, images, images, "fc", 2, 0, CPU, done.append)
    assert found.frechet_distance == pytest.approx(0, abs=1e-9)
    assert (found.features, found.biased) == (5, False)
    assert done == [8, 16]
    assert set(found.metrics()) == {
        *("accuracy", "classifier_score", "classifier_score_std", "frechet_distance")
    }
    few = toys.images(5)
    assert judge_by(verifier, images, few, "fc", 2, 0, CPU).biased  # five images, five features
    alone = judge_by(verifier, images, None, None, 2, 0, CPU)
    assert alone.frechet_distance is None
    assert alone.score == found.score
    assert "frechet_distance" not in alone.metrics()


# --- the application --------------------------------------------------------------------------


@dataclass
class Given:
    """A source of a network that is there already."""

    network: Teacher

    def load(self, seed):
        return self.network


@dataclass
class Held(ImageSource):
    """A source of images that are there already."""

    images: StoredImages

    def open(self, card):
        return self.images


class Unwanted:
    """Images that nothing is to look at."""

    def __len__(self):
        raise AssertionError("it was to be refused before")

    def batch(self, indices):
        raise AssertionError("it was to be refused before")


@pytest.fixture
def context(toys, tmp_path):
    return toys.context(tmp_path)


@pytest.fixture
def teacher(toys):
    return toys.teacher(toys.two_bn(), toys.card(weights_sha256="abc"))


def other(toys, **changes):
    return Given(toys.teacher(toys.residual(), toys.card(weights_sha256="def", **changes)))


def test_judging(toys, teacher, context):
    images, real = toys.images(9), Held(toys.images(4))
    judge = Judge(
        verifiers=(other(toys, name="timm/a.b"), other(toys, name="timm/a.b", trained=False)),
        reference=real,
        splits=3,
    )
    assert judge.run(teacher, images, context).images is images
    verifier = toys.residual()
    seen = verifier(toys.card().normalise(images.images)).argmax(1)
    accuracy = float((seen == images.labels).float().mean())
    assert context.log.metrics["judge.images"] == 9
    for name in ("timm/a_b", "timm/a_b_2"):
        assert context.log.metrics[f"judge.{name}.accuracy"] == pytest.approx(accuracy)
        assert 1 <= context.log.metrics[f"judge.{name}.classifier_score"] <= 3
        assert context.log.metrics[f"judge.{name}.classifier_score_std"] >= 0
        assert context.log.metrics[f"judge.{name}.frechet_distance"] > 0
    assert len(context.log.metrics) == 9
    details = context.log.details["judge"]
    assert (details["images"], details["splits"], details["reference_images"]) == (9, 3, 4)
    assert [row["card"] for row in details["verifiers"]] == ["timm/a.b", "timm/a.b"]
    assert {(row["layer"], row["features"]) for row in details["verifiers"]} == {("fc", 5)}
    notes = "\n".join(context.log.notes)
    assert notes.count("random") == 1
    # Four real images, five features; both verifiers have one name, and what is said is said once.
    assert notes.count("biased upwards") == 1
    assert "9 images and 4 real ones are few" in notes


def test_judging_images_without_labels_or_reference(toys, teacher, context):
    images = toys.images(6)
    bare = StoredImages(images.images, torch.full((6,), NO_LABEL))
    network = toys.teacher(toys.conv_head(), toys.card(weights_sha256="def"))
    Judge(verifiers=(Given(network),), splits=2).run(teacher, bare, context)
    assert set(context.log.metrics) == {
        *("judge.images", "judge.toy.classifier_score", "judge.toy.classifier_score_std")
    }
    assert context.log.details["judge"]["reference_images"] is None
    assert context.log.notes[-1] == (
        "the images have no labels: no verifier's accuracy is measured"
    )


def test_any_source_may_tell_what_its_images_were_dreamed_from(toys, teacher, context):
    class Told(Held):
        def teacher_sha256(self):
            return "def"

    images = Joined((Told(toys.images(6)),))
    with pytest.raises(DreamkitError, match="the inverted teacher itself"):
        Judge(images=images, verifiers=(other(toys),), splits=2).run(teacher, Unwanted(), context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights_sha256": "abc"}, "toy is the inverted teacher itself"),
        ({"classes": 4}, "has 4 classes, the teacher toy has 3"),
        ({"size": (1, 8, 8)}, "takes 1 channels, the images of toy have 3"),
        ({"class_names": ("a", "c", "b")}, "class 1 of the verifier toy is 'c', of the .* 'b'"),
    ],
)
def test_verifiers_that_cannot_judge(toys, changes, message):
    teacher = toys.teacher(
        toys.two_bn(), toys.card(weights_sha256="abc", class_names=("a", "b", "c"))
    )
    card = toys.card(**({"weights_sha256": "def"} | changes))
    with pytest.raises(DreamkitError, match=message):
        check_verifier(toys.teacher(toys.residual(), card), teacher)


def test_networks_without_a_hash_are_told_apart_by_their_weights(toys):
    teacher = toys.teacher(toys.two_bn())
    with pytest.raises(DreamkitError, match="the inverted teacher itself"):
        check_verifier(toys.teacher(toys.two_bn()), teacher)
    changed = toys.two_bn()
    nn.init.zeros_(changed.fc.bias)
    check_verifier(toys.teacher(changed), teacher)
    named = toys.card(class_names=("a", "b", "c"))  # the teacher's are not known
    check_verifier(toys.teacher(changed, named), teacher)


def test_dreams_of_an_earlier_run_are_not_judged_by_the_network_they_came_from(
    toys, teacher, context, tmp_path
):
    # The run's teacher is another network, yet the verifier would judge its own dreams.
    images = toys.images(6)
    stored = StoredImages(images.images, images.labels, torch.zeros(6, 3))
    DreamStore(tmp_path, {"teacher_sha256": "def"}).write(0, stored, 1.0, 0.0, {})
    judge = Judge(images=Dreams(str(tmp_path)), verifiers=(other(toys),), splits=2)
    with pytest.raises(DreamkitError, match="the inverted teacher itself"):
        judge.run(teacher, Unwanted(), context)
    among = Joined((Held(images), Dreams(str(tmp_path))))
    with pytest.raises(DreamkitError, match="the inverted teacher itself"):
        Judge(images=among, verifiers=(other(toys),), splits=2).run(teacher, Unwanted(), context)
    third = Given(toys.teacher(toys.residual(), toys.card(weights_sha256="ghi")))
    source = Dreams(str(tmp_path))
    judge = Judge(images=source, verifiers=(third,), splits=2)
    judge.run(teacher, source.open(teacher.card), context)
    assert context.log.metrics["judge.images"] == 6


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"verifiers": "itself"}, ("verifiers", 1), "the inverted teacher itself"),
        ({"layer": "fd"}, ("layer",), "toy has no module 'fd'"),
        ({"reference": 1}, ("reference",), "at least two reference images"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_images_are_looked_at(
    toys, teacher, context, options, path, message
):
    options = dict(options)
    verifiers = [other(toys)]
    if options.pop("verifiers", None):
        verifiers.append(Given(toys.teacher(toys.copy(teacher.model), teacher.card)))
    real = Held(toys.images(options.pop("reference", 4)))
    judge = Judge(verifiers=tuple(verifiers), reference=real, **options)
    with pytest.raises(DreamkitError, match=message) as caught:
        judge.run(teacher, Unwanted(), context)
    assert caught.value.path == path


def test_too_few_dreams_for_the_splits_are_refused_before_dreaming(toys, teacher, context):
    dreams = Synthesis(SimpleNamespace(images=9), {})
    with pytest.raises(DreamkitError, match="9 images cannot make 10 splits") as caught:
        Judge(verifiers=(other(toys),)).run(teacher, dreams, context)
    assert caught.value.path == ("splits",)


def test_options_that_cannot_stand(toys):
    with pytest.raises(OptionError, match="at least one verifier") as caught:
        Judge()
    assert caught.value.option == "verifiers"
    with pytest.raises(OptionError, match="needs 'reference'") as caught:
        Judge(verifiers=(other(toys),), layer="fc")
    assert caught.value.option == "layer"
    assert Judge(fidelity=True).needs_synthesis
    assert not Judge(fidelity=True, images=Held(None)).needs_synthesis


def test_metric_names():
    names = ["timm/x.y", "timm/x y", "timm/x_y_2", "timm/x.y", "checkpoint/m.n:F-1"]
    assert metric_names(names) == [
        *("timm/x_y", "timm/x_y_2", "timm/x_y_2_2", "timm/x_y_3", "checkpoint/m_n_F-1")
    ]


# --- torch-fidelity ---------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """Stand in for torch-fidelity, and return what it was asked."""
    asked = {}

    def calculate_metrics(**options):
        asked.update(options)
        torch.rand(1)  # as a DataLoader does
        return {"mean": 2.5, "std": 0.5, **({"fid": 7.0} if options["fid"] else {})}

    library, registry = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.registry")
    library.calculate_metrics = calculate_metrics
    library.KEY_METRIC_ISC_MEAN, library.KEY_METRIC_ISC_STD = "mean", "std"
    library.KEY_METRIC_FID = "fid"
    registry.FEATURE_EXTRACTORS_REGISTRY = {"inception-v3-compat": lambda name, layers: None}
    monkeypatch.setitem(sys.modules, "torch_fidelity", library)
    monkeypatch.setitem(sys.modules, "torch_fidelity.registry", registry)
    return asked


def test_fidelity_in_a_run(toys, teacher, context, stand_in):
    reference = Held(toys.images(4))
    judge = Judge(fidelity=True, reference=reference, splits=3)
    judge.run(teacher, toys.images(9), context)
    assert context.log.metrics["judge.inception_score"] == 2.5
    assert context.log.metrics["judge.inception_score_std"] == 0.5
    assert context.log.metrics["judge.fid"] == 7.0
    assert (stand_in["isc_splits"], stand_in["rng_seed"], stand_in["cuda"]) == (3, 3, False)
    assert (len(stand_in["input1"]), len(stand_in["input2"])) == (9, 4)
    assert torch.equal(stand_in["input1"][2], toys.images(9).images[2])


def test_fid_needs_reference_images(toys, stand_in):
    before = torch.get_rng_state()
    found = fidelity_scores(toys.images(4), None, 2, CPU, seed=0)
    assert found.fid is None
    assert stand_in["fid"] is False
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(DreamkitError, match="FID needs at least two images"):
        fidelity_scores(toys.images(4), toys.images(1), 2, CPU, seed=0)
    with pytest.raises(DreamkitError, match="4 images cannot make 5 splits"):
        fidelity_scores(toys.images(4), None, 5, CPU, seed=0)


def test_grey_images_become_rgb(toys, stand_in):
    images = toys.images(2, size=(1, 4, 4))
    fidelity_scores(images, None, 1, CPU, seed=0)
    picture = stand_in["input1"][1]
    assert picture.shape == (3, 4, 4)
    assert all(torch.equal(channel, images.images[1, 0]) for channel in picture)
    with pytest.raises(DreamkitError, match="not 4 channels"):
        check_fidelity(4)


def test_fidelity_without_its_library(teacher, context, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(DreamkitError, match=r'pip install "dreamkit\[fidelity\]"') as caught:
        Judge(fidelity=True).run(teacher, Unwanted(), context)
    assert caught.value.path == ("fidelity",)


def test_weights_that_cannot_be_had(stand_in, monkeypatch, tmp_path):
    def refuse(name, layers):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    registry = sys.modules["torch_fidelity.registry"]
    registry.FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"] = refuse
    with pytest.raises(DreamkitError) as caught:
        check_fidelity(3)
    message = caught.value.message
    assert "(OSError: no route to host)" in message
    assert f"Fetch {fidelity.WEIGHTS_URL} on a machine with a network" in message
    assert message.endswith(str(tmp_path / "checkpoints" / fidelity.WEIGHTS_FILE))


def test_the_real_library_with_a_tiny_extractor(toys, monkeypatch):
    library = pytest.importorskip("torch_fidelity")

    class Tiny(library.FeatureExtractorBase):
        """Logits and features by formula; three classes told by the channels' means."""

        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("logits_unbiased", "2048")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return {"isc": "logits_unbiased", "fid": "2048"}[metric]

        def forward(self, x):
            assert x.dtype == torch.uint8
            assert x.shape[1] == 3
            features = x.float().mean((2, 3)) / 255
            known = {"logits_unbiased": 50 * features, "2048": features}
            return tuple(known[name] for name in self.features_list)

    known = library.registry.FEATURE_EXTRACTORS_REGISTRY
    monkeypatch.setitem(known, "inception-v3-compat", Tiny)
    check_fidelity(3)
    images, reference = toys.images(30), toys.images(40)
    found = fidelity_scores(images, reference, 2, CPU, seed=0)
    ours = [i.images.float().mean((2, 3)) / 255 for i in (images, reference)]
    distance = frechet_distance(*map(Gaussian.of, ours))
    assert found.fid == pytest.approx(distance, abs=1e-6)
    assert 1 <= found.inception_score <= 3
    whole = fidelity_scores(images, None, 1, CPU, seed=0)
    assert whole.fid is None
    assert whole.inception_score == pytest.approx(score(50 * ours[0]).mean, rel=1e-5)


def test_the_real_library_without_its_weights(monkeypatch, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    asked = []

    def offline(url, **options):
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    with pytest.raises(DreamkitError, match="cannot be had") as caught:
        check_fidelity(1)
    assert asked == [fidelity.WEIGHTS_URL]  # the address and the file's name are the library's own
    assert str(weights_path()) in caught.value.message
