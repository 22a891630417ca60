"""A language model of a few thousand weights with a tokenizer of its own: nothing to download."""

import pytest


@pytest.fixture(scope="session")
def tiny_pretrained(tmp_path_factory) -> str:
    """Return a folder that `load_pretrained` opens: a two-layer Llama with random weights."""
    pytest.importorskip("transformers", reason="the sft package needs transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lightning_lora.sft.messages import company_messages

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    texts = [text for example in company_messages("train", 50) for text in (example.text, example.answer)]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|im_end|>", eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
        )
    folder = tmp_path_factory.mktemp("tiny_pretrained")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
