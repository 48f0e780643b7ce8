"""Model cards: what a checkpoint is, what it can do in measured numbers, and how it is used."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .evaluation import table
from .scenes.signs import FREE_PROMPTS, UNTAUGHT_PROMPTS

_BODY = """\
# nextflow-{name}

A small [NextFlow](https://arxiv.org/abs/2601.02204) model: one decoder-only transformer that draws by next-scale
prediction and describes pictures by next-token prediction. It was trained from scratch by
[NextFlow-HF](https://github.com/nextflow-hf/nextflow-hf), an independent open implementation of the paper, whose
authors have published neither code nor weights. It is **not** a NextFlow checkpoint of theirs.

## What it can and cannot do

It knows one small world, *scenes*: one to four circles, squares, triangles, crosses, diamonds and stars, in eight
colours and two sizes, at places that have names ("at the top left") or relative to each other ("left of"), on a plain
white, gray or black background, in pictures of {sizes} pixels (height x width). In that world it can {abilities}. It
knows nothing else: {missing}. Calls that need an ability or a
picture size it was not trained for are refused with an error. How well it does each stands in the table.

{table}

Drawing is scored strictly: a picture counts only if a pixel-level referee finds exactly the objects asked for and
nothing else. All prompts name combinations that training never saw; intervals come from resampling prompts. Sampling
({sampling}) has one number for all scales, or one per scale: a seed changes the first code of a picture, and the rest
follows from it. Every setting is in `evaluation.json`; masked edits, stories, instructions and films have a quarter of
its `tests`, and other sizes than the first one picture a prompt. Reproduce with

```
nextflow-hf evaluate scenes --checkpoint {name}
```

## Use

```python
import nextflow_hf
from transformers import pipeline

draw = pipeline("text-to-image", model=nextflow_hf.{constant})
draw("a red circle to the left of a blue square", seed=7).save("picture.png")
draw("a star at the top right", image_size={wide}).save("wide.png")
```

Once more saved by `save_pretrained` or `push_to_hub`, model and processor carry their code, and load without the
package, where transformers and diffusers are installed: `AutoModelForMultimodalLM.from_pretrained(...,
trust_remote_code=True)` and `AutoProcessor.from_pretrained(..., trust_remote_code=True)`.

## How it was made

{parameters:.1f} million parameters: {decoder:.1f} in the decoder, {tokenizer:.1f} in the image tokenizer ({codes}
codes, one index for a semantic and a pixel vector). Trained with the recipes `mini-*` of the package, on
pictures that a program renders; `training_log.json` has the losses of every stage. Nothing was taken from other weights
or data.
"""


_VERBS = {
    "image": "draw what a prompt asks for",
    "caption": "describe a picture",
    "edit": "change a picture as an instruction says",
    "interleaved": "think before it draws and tell stories in pictures",
    "text": "continue text",
}


def model_card(name: str, model, result: dict) -> ModelCard:
    """The card of a checkpoint.

    Args:
        name: Its name, one of `BUNDLED`.
        model: The model.
        result: What `evaluate_scenes` measured of it.
    """
    config = model.config
    scores = {f"drawing, {category}": own["score"] for category, own in result["drawing"].items()}
    if "captions" in result:
        scores["captions"] = result["captions"]["score"]
    for size, own in result.get("abilities", {}).items():
        scores |= {f"{ability}, {size}": each["score"] for ability, each in own.items() if isinstance(each, dict)}
    sizes = config.trained_image_sizes
    data = _card_data(name, "scenes, unseen combinations", scores, "any-to-any", ["image-to-text"])
    known = [_VERBS[ability] for ability in config.abilities or []]
    if result.get("abilities"):
        known.insert(2, "answer questions about it")
    missing = ["not photographs", "not words in pictures", "not free text"]
    missing += [] if "edit" in (config.abilities or []) else ["not editing"]
    body = _BODY.format(
        name=name,
        constant=name.upper().replace("-", "_"),
        sizes=" or ".join("x".join(map(str, size)) for size in sizes),
        wide=tuple(max(sizes, key=lambda size: size[1] / size[0])),
        sampling=_sampling(result),
        abilities=" and ".join(filter(None, (", ".join(known[:-1]), *known[-1:]))),
        missing=", ".join(missing),
        table=table(result),
        **_sizes_of_parts(model),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


_WORDS_BODY = """\
# nextflow-{name}

A small [NextFlow](https://arxiv.org/abs/2601.02204) model that draws words by next-scale prediction, and does nothing
else. It was trained from scratch by [NextFlow-HF](https://github.com/nextflow-hf/nextflow-hf), an independent open
implementation of the paper, whose authors have published neither code nor weights. It is **not** a NextFlow checkpoint
of theirs.

## What it can and cannot do

It writes one word or number of up to five capital letters or digits, in eight colours on a plain white, gray or black
background, in pictures of 48x80 pixels (height x width) and in one font. Prompts are like those below. It knows nothing
else: no scenes, no lists, no other letters, no reading; `nextflow-mini` is the checkpoint for scenes.

{table}

A word counts where a reader finds it to the letter; letters are 1 - normalised edit distance. The words scored are
English ones, training saw strings of letters and digits that are none of them; intervals come from resampling the
words. The other ways to ask ({ways}) had no example:
rewards alone taught them. The untaught ones ({untaught}) had neither.

Sampling ({sampling}) has one number for all scales, or one per scale. Every setting is in `evaluation.json`.
Reproduce with

```
nextflow-hf evaluate words --checkpoint {name}
```

## Use

```python
import nextflow_hf
from transformers import pipeline

draw = pipeline("text-to-image", model=nextflow_hf.{constant})
draw('the word "OPEN" in red on a white background', seed=7).save("open.png")
draw('the word "42" in green', seed=7).save("number.png")
```

## How it was made

{parameters:.1f} million parameters: {decoder:.1f} in the decoder, {tokenizer:.1f} in the image tokenizer ({codes}
codes, one index for a semantic and a pixel vector). Trained with the recipe `mini-words` of the package on pictures
that a program renders, then rewarded by what the reader finds in its own (`docs/rl.md`); `training_log.json` has the
losses and rewards. Nothing was taken from other weights or data.
"""


def words_card(name: str, model, result: dict) -> ModelCard:
    """The card of a checkpoint that draws words.

    Args:
        name: Its name, one of `BUNDLED`.
        model: The model.
        result: What `evaluate_words` measured of it.
    """
    scores = {measure: own["score"] for measure, own in result["words"].items()}
    data = _card_data(name, "words that training never saw", scores, "text-to-image", [])
    body = _WORDS_BODY.format(
        name=name,
        constant=name.upper().replace("-", "_"),
        sampling=_sampling(result),
        ways=_listed(FREE_PROMPTS),
        untaught=_listed(UNTAUGHT_PROMPTS),
        table=table(result),
        **_sizes_of_parts(model),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _card_data(name: str, tested: str, scores: dict[str, float], pipeline: str, tags: list[str]) -> ModelCardData:
    return ModelCardData(
        model_name=f"nextflow-{name}",
        license="apache-2.0",
        language="en",
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["nextflow", "next-scale-prediction", "text-to-image", *tags],
        eval_results=[
            EvalResult(
                task_type="text-to-image",
                dataset_type="nextflow-hf/scenes",
                dataset_name=tested,
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in scores.items()
        ],
    )


def _listed(ways: tuple[str, ...]) -> str:
    return ", ".join(f"`{way.format(text='OPEN', color='red', background='white')}`" for way in ways)


def _sampling(result: dict) -> str:
    return ", ".join(f"`{setting}` {value}" for setting, value in result["settings"]["sampling"].items())


def _sizes_of_parts(model) -> dict:
    whole, tokenizer = model.num_parameters() / 1e6, model.vq_model.num_parameters() / 1e6
    return {
        "parameters": whole,
        "decoder": whole - tokenizer,
        "tokenizer": tokenizer,
        "codes": model.config.vq_config.codebook_size,
    }


_REFINER_BODY = """\
# nextflow-{name}-refiner

The optional diffusion decoder of `nextflow-{name}` (NextFlow, arXiv 2601.02204, section 2.3): told what the codes of a
picture say, it paints the picture anew, at its own size or twice as large. Trained from scratch by
[NextFlow-HF](https://github.com/nextflow-hf/nextflow-hf), an independent open implementation; not a checkpoint of the
paper's authors. It knows the world of `nextflow-{name}`, *scenes*, and nothing else.

```python
import nextflow_hf
from transformers import pipeline

draw = pipeline("text-to-image", model=nextflow_hf.MINI) | "{name}"
draw("a red circle", seed=7, refining={{"upsampling": 2}}).save("large.png")
```

{parameters:.1f} million parameters in the denoiser, in half precision; `vq_model` is the tokenizer whose codes it was
trained on ({fingerprint}). What it gains and what it costs in measured numbers: `docs/refiner.md` of the package, made
by `python benchmarks/refiner.py`. Trained on a CPU with the recipes `mini-refiner` and
`mini-refiner-doubled`; `training_log.json` has the losses of the last.
"""


def refiner_card(name: str, pipeline) -> ModelCard:
    """The card of a bundled refiner."""
    data = ModelCardData(
        license="apache-2.0", library_name="diffusers", pipeline_tag="image-to-image", tags=["nextflow"]
    )
    body = _REFINER_BODY.format(
        name=name,
        parameters=sum(own.numel() for own in pipeline.refiner.parameters()) / 1e6,
        fingerprint=pipeline.vq_model.fingerprint(),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


_ADAPTER_BODY = """\
# nextflow-{name}-look

{what} for `nextflow-{name}`, an independent open [NextFlow](https://arxiv.org/abs/2601.02204) model, to look and think
in words: to describe a picture of *scenes* with all places, and to edit, compare, answer and go by examples where
descriptions stand in the place of pictures. On for that and off while the model draws, so nothing else changes. It is
added to the loaded checkpoint, as below: `from_pretrained` of this folder alone would look for its base model on the
Hub, where it is not.

```python
from nextflow_hf.in_words import add_adapter, answer_in_words, edit_in_words
from nextflow_hf.inference import load, user

model, processor = load("{name}")
add_adapter(model, "{name}")
edited = edit_in_words(model, processor, picture, "make the circle blue", seed=7)
answer_in_words(model, processor, [[user(picture, edited, "what changed?")]])
```

{table}

All tests show combinations that training never saw. Of {guesses} guesses at a picture, and of {drafts} drafts of one,
the model keeps the one that goes best with its words, by what it reads and by what it would draw. What it does at once,
without the adapter, is in the card of `nextflow-{name}`; some of that is better. Every setting is in `evaluation.json`.
Reproduce with

```
nextflow-hf evaluate in-words --checkpoint {name}
```

Trained on a CPU, to look on pictures that a program renders and to think on texts alone (`docs/training.md` of the
package); `training_log.json` has the losses.
"""


def adapter_card(name: str, ranks: list[int], result: dict) -> ModelCard:
    """The card of a bundled adapter.

    Args:
        name: The checkpoint that it is for, one of `ADAPTERS`.
        ranks: Its rank, and that of the one for thinking, if there is one.
        result: What `evaluate_in_words` measured of it.
    """
    data = ModelCardData(license="apache-2.0", library_name="peft", pipeline_tag="any-to-any", tags=["nextflow"])
    settings = {key: result["settings"][key] for key in ("guesses", "drafts")}
    what = f"An adapter (LoRA of rank {ranks[0]})"
    if len(ranks) == 2:
        what = f"Two adapters (LoRA of rank {ranks[0]}, and, in `think`, of rank {ranks[1]})"
    body = _ADAPTER_BODY.format(name=name, what=what, table=table(result), **settings)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
