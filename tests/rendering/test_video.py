import av
import numpy as np
import pytest

from rendering.video import Clip, captioned, tile, write_clips, write_video

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
