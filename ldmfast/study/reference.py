"""What the study compares its samples with."""

from ldmfast.data.collection import load_pictures
from ldmfast.evaluation.samples import features as small_picture
from ldmfast.metrics import features, sets


class Reference:
    """The real pictures, their features, and what the samples are asked for."""

    def __init__(self, data, config):
        self.pictures = load_pictures(data, config.size, split="train", captions=True)
        self.some = self.pictures.sample(512, config.seed)
        self.side = config.feature_side
        self.features = self.of(self.some.batch(slice(None)))
        asked = self.pictures.sample(config.samples, config.seed + 1).rows
        self.prompts = [row["text"] for row in asked]
        self.label = "object" if all("object" in row for row in self.pictures.rows) else "text"
        self.wanted = [row[self.label] for row in asked]

    def of(self, pictures):
        """Features of pictures [N, 3, H, W] in [-1, 1]."""
        return features.features(pictures.clamp(-1, 1), side=self.side)

    def score(self, samples):
        """KID against the real pictures, and retrieval of what was asked for.   samples [N, 3, H, W]"""
        pixels = ((samples.clamp(-1, 1) + 1) * 127.5).round()
        labels = [row[self.label] for row in self.some.rows]
        near = sets.retrieval(small_picture(pixels), small_picture(self.some.pixels), self.wanted, labels, ranks=(1, 5))
        return {"kid": sets.kid(self.features, self.of(samples)), **near}
