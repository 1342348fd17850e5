"""Quick demonstrations for tests: most steps of an episode show the picture before."""

from envs.aloha import AlohaTransferCube

DRAWN_EVERY = 80


def draw_rarely(monkeypatch):
    """Let all but every 80th step of an episode show the picture before."""
    draw, step = AlohaTransferCube.image, AlohaTransferCube.step
    shown, steps = {}, {}

    def counted(self, action):
        steps[id(self)] = steps.get(id(self), 0) + 1
        return step(self, action)

    def image(self, camera, size_px=None):
        if (id(self), camera) not in shown or steps.get(id(self), 0) % DRAWN_EVERY == 0:
            shown[id(self), camera] = draw(self, camera, size_px)
        return shown[id(self), camera]

    monkeypatch.setattr(AlohaTransferCube, "image", image)
    monkeypatch.setattr(AlohaTransferCube, "step", counted)
