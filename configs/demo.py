"""The main job on a laptop: a tiny Qwen3-VL learns to remember a film.

python train.py --config=configs/demo.py --workdir=runs/demo
python eval.py --config=configs/demo.py --workdir=runs/demo
"""

from videomem_jax import settings


def get_config():
    """Sizes for two CPU cores; everything else is as in a large run."""
    config = settings.default()
    config.data.task = "needle"
    config.data.folder = "runs/needle"
    config.data.test_long = "test_long.jsonl"
    config.data.chain_cards = 5
    # What is dropped is dropped by chance: nothing to be learnt, it unteaches what the base can do.
    # With 0.9, and 2 to 5 cards, PRPO began at 54.8% right answers, so at 63.8%.
    config.data.chain_keep = 1.0
    # Where nothing is remembered yet, an answer is still to be an option.
    config.data.blank = 0.1
    # 8 frames of 96x64 pixels a clip of 16 s: a card of 2 s is seen in one of them.
    config.prompt.segments = 4
    config.prompt.frames = 8
    config.prompt.max_pixels = 6 * 32 * 32
    config.prompt.prefix_tokens = 96
    # The base knows these words: "tell the cards that the question is about", and "tell all of
    # them". Chains keep some card or other, whatever the question: taught as what the first word
    # asks for, they unteach it.
    config.prompt.instruction = "Cards."
    config.coldstart.instruction = "Continue."
    # So small a model answers with an option's word: to find its letter is a skill of its own.
    config.prompt.answer = "text"
    config.prompt.options = 4
    # Else the last answer can be read off the prompt, and no reward asks to keep what it needs.
    config.prompt.answer_from = "memory"
    # A card takes 2 tokens. A video shows 8 on average: 5 fit, and each costs: a card that costs
    # nothing is written where none is asked for, and the longer the video, the oftener.
    config.memory.slots = 10
    config.memory.budget = 0
    config.coldstart.steps = 120
    config.coldstart.batch = 16
    config.coldstart.accumulate = 2
    # Its answers are one token in ten: with weight 1, 69% of those that the memory supported were
    # right where the last card was asked for, and 62% for the first one; with 4, 100 and 91%.
    config.coldstart.answer_weight = 4.0
    config.coldstart.optimizer.learning_rate = 4e-4
    config.prpo.steps = 280
    config.prpo.batch = 16
    config.prpo.group_size = 8
    config.prpo.accumulate = 4
    # Of the groups 84% teach nothing in the end.
    config.prpo.learnt = 2
    # Where no answer is known yet only lengths differ: divided by their deviation, they would rule.
    config.prpo.adv_norm = "none"
    config.prpo.loss_agg = "token"
    # So small a model still slips out of the format, the oftener the more it writes: what it
    # remembers must be worth more than that, and its entropy must last until it has found out.
    config.prpo.alpha = 2.0
    # The last card of a film, or how many of a colour there are, can't be known early: to tell it
    # all the same is to guess, while counting those so far asks to keep them.
    config.prpo.evidence = True
    # Without a memory of it an answer is a guess, right by luck: that is no merit of the memory.
    config.prpo.expected = True
    # The whole cost from the start. Without it memories first grow to all that they can hold, and
    # then have to find again what the question asks for.
    config.prpo.beta = 0.05
    config.prpo.entropy_coef = 0.005
    # Advantages are differences of rewards: lower than for those divided by their deviation.
    config.prpo.tau_0 = 0.5
    config.prpo.optimizer.learning_rate = 1e-3
    config.eval.batch = 32
    config.checkpoints.every = 25
    return config
