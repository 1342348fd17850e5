import weakref

import av
import numpy as np
import pytest

from rendering.video import (
    Clip,
    VideoWriter,
    captioned,
    tile,
    write_clips,
    write_video,
    write_videos,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(colour, height=40, width=60) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def read(path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def test_colours_and_order_survive(tmp_path):
    colours = [RED, GREEN, BLUE, (128, 128, 128), (200, 100, 50)]
    path = write_video(tmp_path / "video.mp4", (plain(c) for c in colours for _ in range(3)), 10.0)
    frames = read(path)
    assert len(frames) == 15
    for index, frame in enumerate(frames):
        expected = np.broadcast_to(colours[index // 3], frame.shape)
        np.testing.assert_allclose(frame, expected, atol=6)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 10
        assert float(stream.duration * stream.time_base) == pytest.approx(1.5)


def test_odd_sizes_grow_to_even_ones(tmp_path):
    frames = read(write_video(tmp_path / "video.mp4", [plain(RED, 33, 47)], 12.5))
    assert frames[0].shape == (34, 48, 3)
    np.testing.assert_allclose(frames[0], plain(RED, 34, 48), atol=6)


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        ([], "no frames"),
        ([plain(RED), plain(RED, 42)], "frame 1"),
        ([plain(RED).astype(np.float32)], "float32"),
        ([plain(RED)[..., 0]], r"\(40, 60\)"),
    ],
)
def test_a_failed_video_leaves_the_old_one(tmp_path, frames, problem):
    path = tmp_path / "video.mp4"
    path.write_text("old")
    with pytest.raises(ValueError, match=problem):
        write_video(path, iter(frames), 10.0)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_frames_are_taken_one_by_one(tmp_path):
    alive = 0

    def frames():
        nonlocal alive
        for _ in range(20):
            yield plain(GREEN)
            alive += 1

    def checked():
        for index, frame in enumerate(frames()):
            assert alive == index
            yield frame

    write_video(tmp_path / "video.mp4", checked(), 10.0)
    assert alive == 20


def test_no_frame_outlives_its_turn(tmp_path):
    seen = []

    def picture(size) -> np.ndarray:
        frame = np.full((size, size, 3), 9, np.uint8)
        seen.append(weakref.ref(frame))
        return frame

    def alive() -> int:
        return sum(frame() is not None for frame in seen)

    def singles():
        for _ in range(30):
            assert alive() == 0
            yield picture(34)

    def pairs():
        for _ in range(30):
            assert alive() == 0
            yield {"small": picture(32), "odd": picture(47)}

    write_video(tmp_path / "one.mp4", singles(), 10.0)
    paths = {name: tmp_path / f"{name}.mp4" for name in ("small", "odd")}
    assert write_videos(paths, pairs(), 10.0) == paths
    assert len(seen) == 90
    assert [len(read(path)) for path in paths.values()] == [30, 30]
    assert read(paths["odd"])[0].shape == (48, 48, 3)


def test_each_video_gets_its_own_pictures(tmp_path):
    colours = {"red": RED, "blue": BLUE}
    paths = {name: tmp_path / "new" / f"{name}.mp4" for name in colours}
    # In another order than the paths.
    frames = [{"blue": plain(BLUE), "red": plain(RED, 20, 20)}] * 4
    write_videos(paths, frames, 12.5)
    for name, path in paths.items():
        for frame in read(path):
            np.testing.assert_allclose(frame, np.broadcast_to(colours[name], frame.shape), atol=6)
    assert read(paths["red"])[0].shape == (20, 20, 3)


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        ([], "no frames"),
        ([{"a": plain(RED), "b": plain(RED)}, {"a": plain(RED)}], r"frame 1.*\['a'\]"),
        ([{"a": plain(RED), "b": plain(RED)}, {"a": plain(RED), "b": plain(RED, 42)}], "frame 1"),
    ],
)
def test_several_videos_fail_together(tmp_path, frames, problem):
    paths = {name: tmp_path / f"{name}.mp4" for name in "ab"}
    paths["a"].write_text("old")
    with pytest.raises(ValueError, match=problem):
        write_videos(paths, iter(frames), 10.0)
    assert list(tmp_path.iterdir()) == [paths["a"]]
    assert paths["a"].read_text() == "old"


def test_two_videos_cannot_share_a_file(tmp_path):
    for paths in ({}, {"a": tmp_path / "x.mp4", "b": str(tmp_path / "x.mp4")}):
        with pytest.raises(ValueError, match="paths"):
            write_videos(paths, iter([]), 10.0)


def test_a_video_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, 10.0) as video:
        for _ in range(3):
            video.write(plain(RED))
            assert not path.exists()
    assert len(read(path)) == 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_what_goes_wrong_between_frames_leaves_no_video(tmp_path, problem):
    def interrupted() -> None:
        with VideoWriter(tmp_path / "video.mp4", 10.0) as video:
            video.write(plain(RED))
            raise problem

    with pytest.raises(problem):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_tiles_keep_their_places():
    grid = tile([plain(RED), plain(GREEN), plain(BLUE)], columns=2)
    assert grid.shape == (80, 120, 3)
    for (row, column), colour in {(0, 0): RED, (0, 1): GREEN, (1, 0): BLUE}.items():
        cell = grid[40 * row : 40 * row + 40, 60 * column : 60 * column + 60]
        np.testing.assert_array_equal(cell, plain(colour))
    np.testing.assert_array_equal(grid[40:, 60:], plain((255, 255, 255)))
    with pytest.raises(ValueError, match="one size"):
        tile([plain(RED), plain(RED, 42)], columns=2)


def test_a_caption_leaves_the_picture_alone_and_fits():
    picture = plain(BLUE, 40, 120)
    for text in ("step 3", "a caption that is much too long for such a narrow picture"):
        shown = captioned(picture, text)
        strip = shown[:-40]
        np.testing.assert_array_equal(shown[-40:], picture)
        assert (strip < 128).any()
        assert (strip[:, -2:] == 255).all()


def test_who_has_ended_stays_in_sight(tmp_path):
    clips = [
        Clip([plain(RED)] * 2, ["short"] * 2),
        Clip([plain(GREEN)] * 5, ["long"] * 5),
    ]
    frames = read(write_clips(tmp_path / "video.mp4", clips, 10.0))
    assert len(frames) == 5
    np.testing.assert_allclose(frames[-1][-32:, 8:52], plain(RED, 32, 44), atol=10)
    np.testing.assert_allclose(frames[-1][-32:, 68:112], plain(GREEN, 32, 44), atol=10)
    with pytest.raises(ValueError, match="without frames"):
        write_clips(tmp_path / "video.mp4", [clips[0], Clip([], [])], 10.0)
