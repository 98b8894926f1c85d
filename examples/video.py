"""Describes a video: a few frames of it, as one medium.

    python examples/video.py                                   # a moving square, a tiny model
    python examples/video.py --model FOLDER --video cat.mp4    # decoded by PyAV

More frames than the model was trained with are allowed: their embeddings are interpolated. The tiny
model is untrained: what it says makes no sense.
"""

import argparse

import tiny
import torch

from flamingo_fast.models.generation import generate
from flamingo_fast.models.processor import Video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a folder that save_pretrained wrote")
    parser.add_argument("--video", help="a file, in place of the moving square")
    parser.add_argument("--frames", type=int, default=8, help="at most so many, evenly")
    arguments = parser.parse_args()
    model, processor = tiny.load(arguments.model)

    # Of a file, of images, or a tensor (frames, 3, height, width).
    moving = [tiny.picture("red", position) for position in range(0, 70, 5)]
    video = Video(arguments.video or moving, num_frames=arguments.frames)
    batch = processor([[video, "A video of "]])
    frames = batch.media[0][0]
    with torch.no_grad():
        tokens, _ = model.encode(frames[None])
    print(f"{len(frames)} frames of {tuple(frames.shape[1:])} are {tokens.shape[1]} tokens")
    output = generate(
        model,
        batch.input_ids,
        videos=batch.media,
        attention_mask=batch.attention_mask,
        max_new_tokens=12,
    )
    print(repr(processor.decode(output.sequences[0])))


if __name__ == "__main__":
    main()
