import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from index.errors import ConfigError
from radt.bundle import Bundle, BundleInfo, FastTwin, FileDigest, StageInfo
from radt.cascade import Stage
from radt.conditioning import EncodedNeighbors, map_tensors
from radt.neighbor_store import ApartEncoder, NeighborStore, StoreUse, content_key, open_neighbor_store
from radt.neighbors import Neighbor, make_batches, to_rgb8
from tests.networks import IMAGE_SIZE, generator, random_text, random_unet

SIZE = (IMAGE_SIZE, IMAGE_SIZE)
WARNINGS = "radt.neighbor_store"
ROOT = Path(__file__).parents[2]


class Captions:
    """A text encoder that knows a caption by its words, and counts what it is asked."""

    fingerprint = "captions"

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked += texts
        rows = [random_text(1, seed=sum(map(ord, text)) + 1) for text in texts]
        return map_tensors(lambda *parts: torch.cat(parts), *rows)


def neighbor(number, caption=None, name=None):
    pixels = torch.randint(0, 256, (*SIZE, 3), generator=generator(number), dtype=torch.uint8)
    return Neighbor(id=name or str(number), caption=caption or f"caption {number}", pixels=pixels)


def encoded(number, *, width=64):
    g = generator(number)
    return EncodedNeighbors(
        maps=(torch.randn(1, 1, 4, width, 4, generator=g), torch.randn(1, 1, 8, 2, 2, generator=g)),
        captions=torch.randn(1, 1, 5, 3, generator=g),
        caption_mask=torch.tensor([[[True, True, True, False, False]]]),
    )


def same(a, b):
    equal = []
    map_tensors(lambda x, y: equal.append(torch.equal(x, y)) or x, a, b)
    return all(equal)


@pytest.fixture
def store(tmp_path):
    return NeighborStore(tmp_path / "neighbors", limit=10**7)


@pytest.fixture(scope="module")
def stages():
    unets = random_unet(1), random_unet(2, low_res_size=8)
    return [Stage(unet=unet, info=StageInfo(name=f"stage{i}")) for i, unet in enumerate(unets)]


@pytest.fixture
def bundle(stages, tmp_path):
    unets = tuple(stage.unet for stage in stages)
    info = BundleInfo(name="small", stages=tuple(stage.info for stage in stages))
    return Bundle(folder=tmp_path, info=info, unets=unets, twins=(None, None), text_encoder=Captions())


@torch.inference_mode()
def encode(bundle, rows, stages, store=None):
    return ApartEncoder(bundle, device="cpu", store=store).encode(rows, stages)


def test_what_was_put_comes_back_to_the_last_bit_in_another_process_too(store, tmp_path):
    store.put("7", "key", encoded(1))
    again = NeighborStore(tmp_path / "neighbors", limit=10**7)
    assert same(again.get("7", "key"), encoded(1))
    assert again.get("7", "other") is None
    assert again.get("8", "key") is None
    assert again.use == StoreUse(hits=1, misses=2)
    assert again.use.hit_rate == round(1 / 3, 4)
    assert StoreUse().hit_rate is None


def test_the_key_follows_pixels_caption_size_and_stage():
    seen = neighbor(1)
    darker = replace(seen, pixels=seen.pixels // 2)
    keys = [
        content_key(seen, SIZE, "stage"),
        content_key(darker, SIZE, "stage"),
        content_key(replace(seen, caption="another"), SIZE, "stage"),
        content_key(seen, (8, 8), "stage"),
        content_key(seen, SIZE, "another"),
    ]
    assert len(set(keys)) == len(keys)
    assert content_key(replace(seen, id="2", score=3.0), SIZE, "stage") == keys[0]


def test_the_stage_key_follows_weights_text_encoder_threads_and_twin(bundle, stages, monkeypatch):
    keys = [ApartEncoder(bundle, device="cpu").stage_key(stage) for stage in stages]
    other = replace(stages[0], unet=random_unet(3))
    listed = [replace(bundle.info, files=(FileDigest(path="stage0/model.safetensors", digest=d),)) for d in "ab"]
    keys.append(ApartEncoder(bundle, device="cpu").stage_key(other))
    keys += [ApartEncoder(replace(bundle, info=info), device="cpu").stage_key(stages[0]) for info in listed]
    twin = replace(stages[0], fast=FastTwin(name="stage0-fast", highest_guidance=4.0))
    keys.append(ApartEncoder(bundle, device="cpu").stage_key(twin))
    texts = Captions()
    texts.fingerprint = "other"
    keys.append(ApartEncoder(replace(bundle, text_encoder=texts), device="cpu").stage_key(stages[0]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    keys.append(ApartEncoder(bundle, device="cpu").stage_key(stages[0]))
    assert len(set(keys)) == len(keys)


def test_a_kept_neighbour_equals_one_encoded_now_in_whatever_company(bundle, stages, store):
    a, b, c = neighbor(1), neighbor(2), neighbor(3)
    encode(bundle, [[b]], stages, store)
    for rows in ([[a, b, c]], [[c, b]], [[b], [a, b]], [[a], []]):
        with_store, without = encode(bundle, rows, stages, store), encode(bundle, rows, stages)
        assert all(same(ours, theirs) for ours, theirs in zip(with_store, without, strict=True))
    assert store.use.misses == 3 * len(stages)
    assert store.use.hits == (1 + 2 + 3 + 1) * len(stages)
    assert encode(bundle, [[], []], stages, store) == [None, None]


def test_apart_is_the_batch_that_a_stage_conditions_on_up_to_rounding(bundle, stages):
    rows = [[neighbor(1), neighbor(2)], [neighbor(3)]]
    batches = make_batches(rows, bundle.text_encoder, [stage.size for stage in stages])
    with torch.inference_mode():
        for stage, batch, apart in zip(stages, batches, encode(bundle, rows, stages), strict=True):
            together = stage.unet.project_neighbors(batch)
            assert torch.equal(apart.mask, together.mask)
            text = random_text(2, seed=9)
            x, t = torch.randn(2, 3, *SIZE, generator=generator(4)), torch.tensor([0.3, 0.8])
            mass = [stage.unet.agreement(text, each) for each in (apart, together)]
            present = together.mask[:, None].expand_as(mass[0])
            torch.testing.assert_close(mass[0][present], mass[1][present])
            if stage.unet.config.low_res is None:
                drawn = [stage.unet(x, t, text, each) for each in (apart, together)]
                torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


def test_found_neighbours_need_neither_text_encoder_nor_unet(bundle, stages, store, monkeypatch):
    rows = [[neighbor(1), neighbor(2)]]
    encode(bundle, rows, stages, store)
    assert bundle.text_encoder.asked == ["caption 1", "caption 2"]  # once each, for both stages
    for stage in stages:
        monkeypatch.setattr(stage.unet, "encode_pairs", None)
    encode(bundle, rows, stages, store)
    assert len(bundle.text_encoder.asked) == 2


def test_the_users_own_references_are_never_kept(bundle, stages, store):
    encode(bundle, [[neighbor(1, name="reference:mine.png")]], stages, store)
    assert store.size() == (0, 0)
    assert store.use == StoreUse()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "not ours"])
def test_a_damaged_file_is_encoded_anew_with_a_note(store, damage, caplog):
    store.put("7", "key", encoded(1))
    store.put("8", "key", encoded(2))
    path = store.folder / "7-key.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes({"cut": content[:-40], "flipped": content, "empty": b"", "not ours": b"hello" * 20}[damage])
    with caplog.at_level(logging.WARNING, WARNINGS):
        assert store.get("7", "key") is None
    assert "7-key.safetensors is damaged" in caplog.text
    assert store.use == StoreUse(misses=1, damaged=1)
    store.put("7", "key", encoded(1))
    assert same(store.get("7", "key"), encoded(1))
    assert same(store.get("8", "key"), encoded(2))


def test_the_least_recently_used_go_first_and_the_bound_holds(tmp_path):
    NeighborStore(tmp_path, limit=10**7).put("0", "key", encoded(0))
    size = NeighborStore(tmp_path, limit=10**7).size()[1]
    store = NeighborStore(tmp_path, limit=32 * size)
    for number in range(1, 60):
        store.put(str(number), "key", encoded(number))
        for place, kept in enumerate(sorted(tmp_path.iterdir(), key=lambda path: int(path.name.partition("-")[0]))):
            os.utime(kept, (1000 + place, 1000 + place))  # in the order they came; clocks are coarse
        assert same(store.get("0", "key"), encoded(0))  # used just now, every time
        assert store.size()[1] <= store.limit
    there = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert {"0", "59", "58"} <= there
    assert not there & {str(number) for number in range(1, 20)}


def test_what_is_larger_than_the_store_is_not_kept_and_that_is_said_once(tmp_path, caplog):
    store = NeighborStore(tmp_path, limit=1000)
    with caplog.at_level(logging.WARNING, WARNINGS):
        for number in range(3):
            store.put(str(number), "key", encoded(number))
    assert store.size() == (0, 0)
    assert caplog.text.count("is encoded each time") == 1


@pytest.mark.parametrize("room", [1, 3])
def test_a_store_of_few_entries_keeps_as_many_as_it_may(store, tmp_path, room):
    store.put("0", "key", encoded(0))
    few = NeighborStore(tmp_path / "few", limit=room * store.size()[1] * 16 // 15 + 1)
    for number in range(5):
        few.put(str(number), "key", encoded(number))
        os.utime(few.folder / f"{number}-key.safetensors", (1000 + number, 1000 + number))
        assert few.size()[1] <= few.limit
    assert {path.name[0] for path in few.folder.iterdir()} == {str(number) for number in range(5 - room, 5)}


def test_files_of_others_in_its_folder_are_left_alone(store):
    store.put("1", "key", encoded(1))
    store.put("2", "key", encoded(2))
    for name in ("model.safetensors", "model-1.safetensors", "\u00b2-key.safetensors"):
        (store.folder / name).write_bytes(b"not ours")
    asked = []

    def matching_ids(condition):
        asked.append(condition)
        return torch.tensor([2])

    store.follow(SimpleNamespace(store=SimpleNamespace(version=1, matching_ids=matching_ids)))
    assert asked == ["id IN (1, 2)"]
    assert store.size()[0] == store.clear() == 1
    assert len(list(store.folder.glob("*.safetensors"))) == 3


def test_a_disk_that_refuses_is_said_once_and_the_request_goes_on(bundle, stages, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    store = NeighborStore(tmp_path / "file" / "neighbors", limit=10**7)
    rows = [[neighbor(1), neighbor(2)]]
    with caplog.at_level(logging.WARNING, WARNINGS):
        with_store = encode(bundle, rows, stages, store)
    assert caplog.text.count("cannot keep encoded neighbours") == 1
    assert all(same(a, b) for a, b in zip(with_store, encode(bundle, rows, stages), strict=True))


def test_many_at_once_write_read_and_evict_without_a_wrong_answer(tmp_path):
    limit = 17 * 5000
    wrong, found = [], []

    def work(seed):
        store = NeighborStore(tmp_path, limit=limit)  # its own, as a process has
        order = torch.randint(0, 12, (60,), generator=generator(seed)).tolist()
        for number in order:
            kept = store.get(str(number), "key")
            if kept is None:
                store.put(str(number), "key", encoded(number, width=8))
            else:
                found.append(number)
                if not same(kept, encoded(number, width=8)):
                    wrong.append(number)
        store.note(store.use)
        wrong.extend([None] * store.use.damaged)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = NeighborStore(tmp_path, limit=limit)
    assert wrong == []
    assert store.size()[1] <= limit * 2  # each may be a sixteenth above it
    total = store.total_use()
    assert (total.hits, total.hits + total.misses) == (len(found), 6 * 60)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_killed_process_left_goes_after_a_while(store):
    store.put("1", "key", encoded(1))
    old, new = store.folder / ".2-key.safetensors.new-1", store.folder / ".3-key.safetensors.new-2"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    assert store.size()[0] == 1
    NeighborStore(store.folder, limit=10**7).put("4", "key", encoded(4))
    assert not old.exists()
    assert new.exists()


def test_lookups_of_all_requests_add_up_and_their_file_stays_small(store, monkeypatch):
    monkeypatch.setattr("radt.neighbor_store.LOOKUPS_BYTES", 50)
    store.put("1", "key", encoded(1))
    for _ in range(40):
        store.note(StoreUse(hits=3, misses=1))
    assert store.total_use() == StoreUse(hits=120, misses=40)
    assert (store.folder / "lookups").stat().st_size < 70
    described = store.describe()
    assert (described["entries"], described["hit_rate"]) == (1, 0.75)
    assert store.clear() == 1
    assert list(store.folder.iterdir()) == []
    assert store.total_use() == StoreUse()


def test_a_size_that_is_none_is_one_sentence():
    for size in ("lots", "-3M"):
        with pytest.raises(ConfigError, match="is not a size"):
            open_neighbor_store(size, kb=None)
    with pytest.raises(ConfigError, match="at least 1"):
        open_neighbor_store(0, kb=None)


def test_pictures_that_a_stage_sees_alike_are_one_to_it():
    large = to_rgb8(Image.new("RGB", (64, 64), "red"), (64, 64))
    seen = Neighbor(id="1", caption="red", pixels=large)
    assert content_key(seen, (8, 8), "s") == content_key(replace(seen, pixels=seen.at((16, 16))), (8, 8), "s")


WRITER = """
import sys, torch
from pathlib import Path
from radt.conditioning import EncodedNeighbors
from radt.neighbor_store import NeighborStore

store = NeighborStore(Path(sys.argv[1]), limit=10**8)
print("ready", flush=True)
for number in range(10**6):
    made = EncodedNeighbors(
        maps=(torch.full((1, 1, 4, 64, 64), float(number)),),
        captions=torch.zeros(1, 1, 2, 3),
        caption_mask=torch.ones(1, 1, 2, dtype=torch.bool),
    )
    store.put(str(number % 50), "key", made)
"""


@pytest.mark.slow
def test_processes_killed_while_they_write_leave_whole_entries(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    time.sleep(0.5)
    for writer in writers:
        writer.kill()
        writer.communicate()
    store = NeighborStore(tmp_path, limit=10**8)
    found = [store.get(path.name.partition("-")[0], "key") for path in tmp_path.glob("*-key.safetensors")]
    assert found
    assert all(each is not None and len(each.maps[0].unique()) == 1 for each in found)
    assert store.use.damaged == 0
