"""Extractors beside the libraries they come from, and what is said where one cannot be had."""

import json
import os
import pickle
import shutil
import urllib.error
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from index.config import to_dict
from index.embedder import ClipEmbedder, _named_weights
from index.errors import ConfigError, ModelError, QueryError
from radt.bundle import BundleInfo, StageInfo
from radt.evaluation import extractors
from radt.evaluation.extractors import (
    Extractor,
    InceptionExtractor,
    OpenClipExtractor,
    RecognizerExtractor,
    TimmExtractor,
    load_extractor,
    resize_clean,
)
from radt.evaluation.image_measures import Options
from radt.evaluation.image_set import find_pictures
from radt.evaluation.images import measure_images
from tests.fakes import draw


def noise(width, height, *, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Resizing


def test_clean_resize_is_that_of_clean_fid_to_the_last_bit():
    """`build_resizer("clean")` of clean-fid 0.1.35: each channel in float through Pillow, then cut off."""
    picture, side = noise(50, 37), 24
    channels = [
        np.asarray(Image.fromarray(np.asarray(picture)[:, :, i].astype(np.float32)).resize((side, side), Image.BICUBIC))
        for i in range(3)
    ]
    np.testing.assert_array_equal(resize_clean(picture, side), np.stack(channels, axis=2).clip(0, 255))


def test_clean_resize_keeps_what_has_the_size_and_does_not_alias():
    picture = noise(16, 16)
    np.testing.assert_array_equal(resize_clean(picture, 16), np.asarray(picture))
    board = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    np.testing.assert_allclose(resize_clean(board, 8)[2:-2, 2:-2], 127.5, atol=1)  # torch without antialias: 0 or 255
    assert resize_clean(noise(9, 200), 40).shape == (40, 40, 3)


# Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's network with random weights, and its file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Fresh(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            """Keeps what it was born with."""

    empty = tmp_path_factory.mktemp("inception") / "empty.pth"
    torch.save({}, empty)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Fresh("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(empty))
    path = empty.with_name("weights.pth")
    torch.save(network.state_dict(), path)
    return network, path


def test_inception_gives_what_torch_fidelity_gives(inception):
    network, path = inception
    extractor = load_extractor(f"inception:{path}")
    assert isinstance(extractor, Extractor)
    assert (extractor.kind, extractor.side, extractor.width) == ("inception", 299, 2048)
    pictures = [noise(299, 299, seed=i) for i in range(2)]
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack([np.asarray(each) for each in pictures])).permute(0, 3, 1, 2)
        features, logits = network(pixels)
    found = extractor.extract(pictures)
    assert found.features.shape == (2, 2048)
    assert found.logits is not None
    np.testing.assert_allclose(found.features, features.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert np.std(found.features, axis=0).max() > 0


def test_only_over_the_published_weights_a_distance_is_called_fid(inception, tmp_path):
    _, path = inception
    extractor = InceptionExtractor.load(path)
    assert not extractor.is_published
    for i in range(5):
        draw(i).save(tmp_path / f"{i}.png")
    pictures = find_pictures(str(tmp_path))

    def titles():
        options = Options(measures=("fd", "kid", "is"), subsets=2)
        report = measure_images(pictures, [extractor], reals=pictures, options=options, cache=tmp_path / "cache")
        return [row.title for row in report.rows]

    assert titles() == ["FD", "KD", "classifier score"]
    extractor.is_published = True
    assert titles() == ["FID", "KID", "inception score"]


def test_a_number_is_no_class_of_inception(inception, tmp_path):
    draw(0).save(tmp_path / "0.png")
    (tmp_path / "captions.csv").write_text("file,label\n0.png,207\n")
    pictures = find_pictures(str(tmp_path), captions=tmp_path / "captions.csv")
    with pytest.raises(QueryError, match=r"soa .*: nothing says what the 1,008 classes of inception:\S+ are: name an"):
        measure_images(pictures, [InceptionExtractor.load(inception[1])], options=Options(measures=("soa",)))


def test_weights_of_something_else_are_one_sentence(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match="holds no weights of this Inception"):
        InceptionExtractor.load(path)
    with pytest.raises(ModelError, match="there is no file"):
        InceptionExtractor.load(tmp_path / "none.pth")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match=r"is no file of weights .*: copy it again"):
        InceptionExtractor.load(path)


class Told:
    """What a pickle makes by calling a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_inside_a_weights_file_is_run(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    torch.save({"weight": Told(str(mark))}, path, pickle_module=pickle)
    with pytest.raises(ModelError, match="is no file of weights"):
        InceptionExtractor.load(path)
    assert not mark.exists()


def test_without_a_network_missing_weights_are_one_sentence(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(ModelError, match=r"cannot be fetched .*unreachable.* bring weights-inception.* inception:FILE"):
        load_extractor("inception")


# open_clip


def test_open_clip_is_the_embedder(tiny_clip):
    extractor = load_extractor(f"open_clip:{tiny_clip}")
    embedder = ClipEmbedder.load(str(tiny_clip))
    assert isinstance(extractor, Extractor)
    assert isinstance(extractor, OpenClipExtractor)
    pictures = [draw(i, size=48) for i in range(3)]
    np.testing.assert_array_equal(extractor.extract(pictures).features, embedder.images(pictures))
    np.testing.assert_array_equal(extractor.texts(["a wolf"]), embedder.texts(["a wolf"]))
    assert extractor.extract(pictures).logits is None
    assert extractor.fingerprint == embedder.fingerprint
    assert extractor.width == extractor.extract(pictures).features.shape[1]
    assert extractor.resize == "the model's own: Resize 32 bicubic, CenterCrop 32x32"


def test_only_over_its_published_model_a_gaussian_mmd_is_called_cmmd(tiny_clip, tmp_path):
    for i in range(2):
        draw(i).save(tmp_path / f"{i}.png")
    pictures = find_pictures(str(tmp_path))
    extractor = OpenClipExtractor.load(str(tiny_clip))
    assert not extractor.is_published

    def title():
        return measure_images(pictures, [extractor], reals=pictures, options=Options(measures=("cmmd",))).rows[0].title

    assert title() == "MMD"
    extractor.is_published = True
    assert title() == "CMMD"
    # however it is typed, open_clip's full name is this one
    for typed in ("ViT-L-14-336-quickgelu", "ViT-L-14-336-quickgelu/openai"):
        assert "/".join(_named_weights(typed)) == extractors.CMMD_MODEL


def test_an_encoder_knows_the_bundle_whose_prompts_it_reads(tiny_clip, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_clip, bundle / "clip")
    info = BundleInfo(name="tiny", stages=(StageInfo(name="base"),))

    def found(name, text_encoder=None):
        (bundle / "bundle.json").write_text(json.dumps(to_dict(replace(info, text_encoder=text_encoder))))
        return OpenClipExtractor.load(str(name)).bundle

    assert found(bundle) == found(bundle / "clip") == info.digest
    assert found(bundle, text_encoder="google/t5-v1_1-xxl") is None  # another reads its prompts
    assert found(tiny_clip) is None
    (bundle / "bundle.json").write_text("{}")
    assert OpenClipExtractor.load(str(bundle)).bundle is None


def test_other_weights_have_another_digest(tiny_clip, other_clip):
    assert load_extractor(f"open_clip:{tiny_clip}").digest != load_extractor(f"open_clip:{other_clip}").digest


def test_another_activation_or_another_number_of_heads_has_another_digest(tiny_clip, tmp_path):
    shutil.copytree(tiny_clip, tmp_path / "clip")
    config = tmp_path / "clip" / "open_clip_config.json"
    plain = config.read_text()
    found = [load_extractor(f"open_clip:{tiny_clip}")]
    for old, new in (('"embed_dim"', '"quick_gelu": true, "embed_dim"'), ('"head_width": 16', '"head_width": 8')):
        assert old in plain
        config.write_text(plain.replace(old, new))
        found.append(load_extractor(f"open_clip:{tmp_path / 'clip'}"))
    assert len({extractor.digest for extractor in found}) == 3
    assert len({extractor.fingerprint for extractor in found}) == 1  # the weights are the same
    config.write_text(plain)
    assert load_extractor(f"open_clip:{tmp_path / 'clip'}").digest == found[0].digest  # the folder's name is no part


# timm


def test_two_timm_networks_of_the_same_weights_have_two_digests():
    import timm

    plain, other = timm.create_model("test_vit"), timm.create_model("test_vit", act_layer="quick_gelu")
    other.load_state_dict(plain.state_dict())
    one, two = (TimmExtractor(network, name="timm:test_vit") for network in (plain, other))
    assert one.digest != two.digest
    assert np.abs(one.extract([noise(40, 40)]).features - two.extract([noise(40, 40)]).features).max() > 0
    assert TimmExtractor(plain, name="timm:\udce4").name == r"timm:\udce4"
    assert TimmExtractor(plain, name="timm:other").digest == one.digest


def test_timm_features_come_before_its_classifier():
    extractor = load_extractor("timm:test_vit:untrained")
    assert isinstance(extractor, Extractor)
    assert isinstance(extractor, TimmExtractor)
    pictures = [noise(40, 40, seed=i) for i in range(extractors.BATCH_ROWS + 1)]
    found = extractor.extract(pictures)
    assert found.features.shape == (len(pictures), extractor.width)
    assert found.logits is not None
    assert found.logits.shape == (len(pictures), 1000)
    head = extractor._network.get_classifier()
    with torch.inference_mode():
        np.testing.assert_allclose(head(torch.from_numpy(found.features)).numpy(), found.logits, rtol=1e-3, atol=1e-5)
    alone = extractor.extract(pictures[:1])
    np.testing.assert_allclose(alone.features, found.features[:1], rtol=1e-3, atol=1e-5)
    assert extractor.class_words["tench"] == 0
    assert dict(extractor.class_numbers) == {i: i for i in range(1000)}  # both cranes, too
    again = load_extractor("timm:test_vit:untrained")
    assert again.digest == extractor.digest
    assert "160x160, PIL bicubic with antialias" in extractor.resize


def test_timm_takes_a_checkpoint(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    network = timm.create_model("test_vit")
    path = tmp_path / "weights.safetensors"
    save_file(network.state_dict(), path)
    extractor = load_extractor(f"timm:test_vit:{path}")
    assert extractor.digest != load_extractor("timm:test_vit:untrained").digest
    weights = extractor._network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


def test_a_timm_folder_that_names_its_classes_is_asked_for_them(tmp_path):
    import timm
    from timm.models import save_for_hf

    network = timm.create_model("test_vit", num_classes=3)
    names = {"label_names": ["Red Fox", "wolf", "bear"]}
    save_for_hf(network, tmp_path / "mine", model_config=names, safe_serialization=True)
    extractor = load_extractor(f"timm:{tmp_path / 'mine'}")
    assert extractor.class_words == {"red fox": 0, "wolf": 1, "bear": 2}
    assert extractor.class_numbers == {0: 0, 1: 1, 2: 2}


def test_timm_takes_a_folder_of_its_hub(tmp_path):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(6)
    network = timm.create_model("test_vit", num_classes=7)
    save_for_hf(network, tmp_path / "mine", safe_serialization=True)
    extractor = load_extractor(f"timm:{tmp_path / 'mine'}")
    found = extractor.extract([draw(0)])
    assert found.logits is not None
    assert found.logits.shape == (1, 7)
    assert dict(extractor.class_words) == dict(extractor.class_numbers) == {}  # seven classes are not ImageNet's
    weights = extractor._network.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


def test_nothing_inside_a_file_for_timm_is_run_though_timm_would_run_it(monkeypatch, tmp_path):
    import timm
    from timm.models import _helpers, save_for_hf

    def trusting(checkpoint_path, map_location="cpu", **_):  # as timm had it
        return torch.load(checkpoint_path, map_location=map_location, weights_only=False)

    monkeypatch.setattr(_helpers, "_torch_load", trusting)
    monkeypatch.delenv(extractors.TENSORS_ALONE, raising=False)
    mark, folder = tmp_path / "mark", tmp_path / "mine"
    save_for_hf(timm.create_model("test_vit", num_classes=3), folder, safe_serialization=False)
    (file,) = folder.glob("*.bin")
    load_extractor(f"timm:{folder}")  # an honest pickle of tensors is read
    torch.save({"weight": Told(str(mark))}, file, pickle_module=pickle)
    for name in (f"timm:test_vit:{file}", f"timm:{folder}"):
        with pytest.raises(ModelError, match="cannot load the timm model"):
            load_extractor(name)
    assert not mark.exists()
    assert extractors.TENSORS_ALONE not in os.environ


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("timm:test_vitt:untrained", r"cannot load the timm model 'test_vitt' \(did you mean 'test_vit"),
        ("timm:test_vit:none.pth", "there is no file 'none.pth'"),
        ("timm:test_vit", "cannot load the timm model 'test_vit': .* name a model of timm, with a file"),
    ],
)
def test_a_timm_model_that_cannot_be_had_is_one_sentence(monkeypatch, name, sentence):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=sentence) as error:
        load_extractor(name)
    assert "\n" not in str(error.value)


# Our own recogniser


def test_the_recogniser_is_an_extractor_with_words_for_its_classes(tmp_path):
    from radt.corpora.emoji import load_entities
    from radt.corpora.wording import noun
    from radt.recognizer_network import RecognizerConfig, RecognizerNetwork, save_recognizer

    wolf = next(entity for entity in load_entities() if entity.name == "wolf")
    config = RecognizerConfig(image_size=16, widths=(8, 8), feature_width=8)
    save_recognizer(tmp_path / "recognizer", RecognizerNetwork(config, 3), sorted([0, 5, wolf.class_id]))
    extractor = load_extractor(f"recognizer:{tmp_path / 'recognizer'}")
    assert isinstance(extractor, Extractor)
    assert isinstance(extractor, RecognizerExtractor)
    found = extractor.extract([draw(i) for i in range(4)])
    assert found.features.shape == (4, extractor.width)
    assert found.logits is not None
    assert found.logits.shape == (4, 3)
    assert extractor.class_words[noun(wolf)] == 2
    assert extractor.class_numbers == {0: 0, 5: 1, wolf.class_id: 2}
    assert len(extractor.digest) == 32
    assert extractor.digest != extractor._recognizer.digest  # it sees other pixels than `emoji-draw` shows it
    with pytest.raises(ModelError, match="there is no emoji recogniser"):
        load_extractor(f"recognizer:{tmp_path}")


# Names


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("inceptoin", "there is no extractor 'inceptoin': did you mean 'inception'"),
        ("dino", "there is no extractor 'dino': It is one of inception"),
        ("open_clip", "'open_clip' needs to be told which model"),
        ("timm:", "'timm:' needs to be told which model"),
        ("", "there is no extractor ''"),
    ],
)
def test_a_name_of_no_extractor(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_extractor(name)
