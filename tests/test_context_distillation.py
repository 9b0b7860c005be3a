"""Context distillation: what the teacher reads, token for token, and that nothing else changes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastkd.batch import Prompt, Rollout, pack
from fastkd.context_distillation import TeacherPrompts, summary
from fastkd.driver import locate, prepare
from fastkd.errors import DataError
from fastkd.recipe import load_recipe, recipe_from
from fastkd.shared_weights import shares_student
from fastkd.student import Student
from fastkd.teacher import Teacher

CPU = torch.device("cpu")
PLAIN = "{{ messages[0].content }}"
"""A chat template that adds nothing: every token of a prefix can be counted by hand."""


@pytest.fixture
def tokenizer(arithmetic):
    return AutoTokenizer.from_pretrained(arithmetic / "reader")


@pytest.fixture
def plain(tokenizer):
    tokenizer.chat_template = PLAIN
    return tokenizer


def recipe(arithmetic, context=None, **sections):
    folder = str(arithmetic / "reader")
    policy = {"model_name": folder, "precision": "float32", "train_global_batch_size": 64, **sections.pop("policy", {})}
    return recipe_from(
        {
            "distillation": {
                "topk_logits_k": 32,
                "num_prompts_per_step": 64,
                "context_distillation": {"enabled": True, **(context or {})},
            },
            "policy": policy,
            "teacher": {"model_name": folder},
            "data": {"train": {"data_path": "unused.jsonl"}},
            **sections,
        }
    ).recipe


def prompts_for(tokenizer, longest=64, kwargs=None, **context):
    config = recipe_from(
        {
            "distillation": {"context_distillation": {"enabled": True, **context}},
            "policy": {"model_name": "a"},
            "teacher": {"model_name": "a"},
            "data": {"train": {"data_path": "x"}},
        }
    ).recipe.distillation.context_distillation
    return TeacherPrompts(config, tokenizer, kwargs, longest)


def rollout(tokenizer, problem, response, index=0, **prompt):
    tokens = tuple(tokenizer(problem, add_special_tokens=False).input_ids)
    ids = tuple(tokenizer(response, add_special_tokens=False).input_ids)
    return Rollout(Prompt(index, problem, None, problem, tokens, **prompt), 0, ids, True, 0)


def texts(tokenizer, tokens):
    return [tokenizer.decode([token]) for token in tokens]


STATIC = {"trace_source": "static_dataset", "static_trace": {"answer_column": "worked"}}


# --- token positions, counted by hand -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("truncate_prefix_only", "56789"), ("truncate_prefix_from_end", "01234")],
)
def test_overflow_keeps_the_tail_or_the_head_and_all_of_the_response(plain, policy, kept):
    """Prefix of 10 digits, response of 3: a longest sequence of 8 leaves 5 tokens for the prefix."""
    build = prompts_for(plain, 8, **STATIC, overflow_policy=policy, teacher_prefix_template="{problem}{trace}")
    student = rollout(plain, "01", "a12", columns=(("worked", "23456789"),))
    found = build([student])
    [teacher] = found.teacher
    assert texts(plain, teacher.prompt.tokens) == list(kept)
    assert found.student == [student] and teacher.response == student.response
    assert found.metrics["context_distillation_prefix_truncation_rate"] == 1.0
    assert found.metrics["context_distillation_prefix_length"] == 5.0
    # P = 5 and r = 2: teacher rows 4, 5, 6 score student rows 1, 2, 3.
    assert pack([teacher]).active_A.tolist() == [4, 5, 6]
    assert pack([student]).active_A.tolist() == [1, 2, 3]
    assert pack([teacher]).labels_A.tolist() == pack([student]).labels_A.tolist() == list(student.response)


def test_a_prefix_that_just_fits_is_whole(plain):
    build = prompts_for(plain, 13, **STATIC, teacher_prefix_template="{problem}{trace}")
    found = build([rollout(plain, "01", "123", columns=(("worked", "23456789"),))])
    assert texts(plain, found.teacher[0].prompt.tokens) == list("0123456789")
    assert found.metrics["context_distillation_prefix_truncation_rate"] == 0.0


@pytest.mark.parametrize(("longest", "dropped"), [(3, 1), (4, 0)])
def test_a_response_that_leaves_no_room_is_dropped(plain, longest, dropped):
    build = prompts_for(plain, longest, **STATIC, teacher_prefix_template="{problem}{trace}")
    found = build([rollout(plain, "01", "123", columns=(("worked", "2"),))])
    assert found.metrics["context_distillation_dropped_no_prefix_budget"] == dropped
    assert found.metrics["context_distillation_dropped_samples"] == dropped
    assert [len(side[0].response) for side in (found.student, found.teacher)] == [0 if dropped else 3] * 2
    if not dropped:
        assert texts(plain, found.teacher[0].prompt.tokens) == ["2"]


@pytest.mark.parametrize(
    ("response", "cut"),
    [
        ("<think>12</think>3", "12"),
        ("<think>1<think>2</think>3</think>4", "1<think>2"),
        ("<think>12", None),
        ("123", None),
        ("<think>  </think>3", None),
    ],
)
@pytest.mark.parametrize("policy", ["empty", "drop_sample"])
def test_dynamic_traces_and_missing_ones(plain, response, cut, policy):
    build = prompts_for(
        plain,
        200,
        teacher_prefix_template="7{problem}8{trace}9",
        trace_extractor={"missing_trace_policy": policy},
    )
    student = rollout(plain, "01", response)
    found = build([student])
    [teacher] = found.teacher
    assert found.metrics["context_distillation_trace_coverage"] == (cut is not None)
    if cut is None and policy == "drop_sample":
        assert teacher.response == () and found.student[0].response == ()
        assert found.metrics["context_distillation_dropped_missing_trace"] == 1
        return
    assert "".join(texts(plain, teacher.prompt.tokens)) == f"7018{cut or ''}9"
    assert teacher.response == student.response and found.student[0] is student
    # Row P-1, the last of the prefix, predicts the first token of the response.
    assert pack([teacher]).active_A.tolist()[0] == len(teacher.prompt.tokens) - 1


def test_a_trace_of_fifty_thousand_characters(plain):
    digits = "0123456789" * 5_000
    build = prompts_for(plain, 60, teacher_prefix_template="{problem}{trace}")
    response = rollout(plain, "7", f"<think>{digits}</think>1")
    short = replace(response, response=response.response[-20:])
    build_static = prompts_for(plain, 60, **STATIC, teacher_prefix_template="{problem}{trace}")
    with_column = replace(short, prompt=replace(short.prompt, columns=(("worked", digits),)))
    [teacher] = build_static([with_column]).teacher
    assert "".join(texts(plain, teacher.prompt.tokens)) == digits[-40:]
    # As a response it takes all the room there is, and the sample is dropped instead of cut.
    assert build([response]).metrics["context_distillation_dropped_no_prefix_budget"] == 1


def test_a_tag_that_the_chat_template_opened_belongs_to_the_trace(plain):
    build = prompts_for(plain, 64, teacher_prefix_template="{problem}={trace}")
    one = rollout(plain, "01", "12</think>3")
    opened = replace(one, prompt=replace(one.prompt, text="01<think>\n"))
    assert build([opened]).teacher[0].prompt.text == "01=12"
    assert build([one]).teacher[0].prompt.text == "01="


def test_special_tokens_in_a_trace_end_no_message(tokenizer):
    build = prompts_for(tokenizer, 200, **STATIC, teacher_prefix_template="{problem} {trace}")
    worked = "12<|im_end|>\n<|im_start|>assistant\n3"
    [teacher] = build([rollout(tokenizer, "1?", "2", columns=(("worked", worked),))]).teacher
    assert teacher.prompt.text == "<|im_start|>user\n1? 12\nassistant\n3<|im_end|>\n<|im_start|>assistant\n"
    assert list(teacher.prompt.tokens).count(tokenizer.eos_token_id) == 1


def test_template_kwargs_system_message_and_columns_reach_the_prefix(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ enable_thinking }}"
    build = prompts_for(
        tokenizer, 200, {"enable_thinking": True}, teacher_prefix_template="{problem} \\boxed{{}} {level}/{hint}"
    )
    one = rollout(tokenizer, "1?", "2", system="Count.", columns=(("hint", "use 3"), ("level", "5")))
    found = build([one])
    assert found.teacher[0].prompt.text == "[system]Count.[user]1? \\boxed{} 5/use 3True"
    assert found.metrics["context_distillation_trace_coverage"] == 1.0
    lacking = build([replace(one, prompt=replace(one.prompt, columns=(("hint", "use 3"), ("level", None))))])
    assert lacking.teacher[0].prompt.text == "[system]Count.[user]1? \\boxed{} /use 3True"
    assert lacking.metrics["context_distillation_trace_coverage"] == 0.0


def test_a_batch_keeps_its_order_and_counts_what_was_sampled(plain):
    build = prompts_for(plain, 8, **STATIC, trace_extractor={"missing_trace_policy": "drop_sample"},
                        teacher_prefix_template="{problem}{trace}")  # fmt: skip
    worked = (("worked", "234"),)
    batch = [
        rollout(plain, "01", "12", 0, columns=worked),
        replace(rollout(plain, "01", "12", 1, columns=worked), response=()),  # a masked prompt
        rollout(plain, "01", "12", 2),  # no trace
        rollout(plain, "01", "12345678", 3, columns=worked),  # no room
        rollout(plain, "01234", "12345", 4, columns=worked),  # 8 tokens of prefix, room for 3
    ]
    found = build(batch)
    for side in (found.student, found.teacher):
        assert [one.prompt.index for one in side] == [0, 1, 2, 3, 4]
        assert [len(one.response) for one in side] == [2, 0, 0, 0, 5]
    assert found.metrics == {
        "context_distillation_trace_coverage": 0.75,
        "context_distillation_prefix_truncation_rate": 0.5,
        "context_distillation_prefix_length": 4.0,
        "context_distillation_dropped_samples": 2.0,
        "context_distillation_dropped_missing_trace": 1.0,
        "context_distillation_dropped_no_prefix_budget": 1.0,
        "context_distillation_dropped_empty_prefix": 0.0,
    }
    totals = summary([found.metrics, {}, found.metrics])
    assert totals["context_distillation_dropped_samples"] == 4.0
    assert totals["context_distillation_trace_coverage"] == 0.75
    assert prompts_for(plain, 8, metrics={"enabled": False})(batch).metrics == {}


# --- scores against a dense computation ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(arithmetic):
    return AutoModelForCausalLM.from_pretrained(arithmetic / "reader", attn_implementation="eager").eval()


@torch.no_grad()
def dense_logits(reader, prefix, response):
    """[n, V] logits of a response behind a prefix, by transformers alone on that one sequence."""
    ids = torch.tensor([[*prefix, *response]])
    return reader(ids, use_cache=False).logits[0, len(prefix) - 1 : -1]


words = st.text("0123456789+-= abcé<>{}|\n", max_size=30)
samples = st.lists(st.tuples(words, words, st.lists(st.integers(3, 415), max_size=12)), min_size=1, max_size=5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples, st.integers(4, 60), st.sampled_from([None, 8, 40]), st.booleans(), st.booleans())
def test_scores_are_those_of_the_teachers_whole_sequence(
    arithmetic, tokenizer, reader, drawn, longest, packed, tail, drop
):
    context = {
        **STATIC,
        "teacher_prefix_template": "{trace}|{problem}",
        "overflow_policy": "truncate_prefix_only" if tail else "truncate_prefix_from_end",
        "trace_extractor": {"missing_trace_policy": "drop_sample" if drop else "empty"},
    }
    packing = {"sequence_packing": {"enabled": packed is not None, "train_mb_tokens": packed or 1}}
    config = recipe(arithmetic, context, policy={"logprob_batch_size": 2, **packing})
    batch = [
        replace(rollout(tokenizer, problem, "", index, columns=(("worked", worked),)), response=tuple(response))
        for index, (problem, worked, response) in enumerate(drawn)
    ]
    found = TeacherPrompts(config.distillation.context_distillation, tokenizer, None, longest)(batch)
    scored = Teacher(config, CPU, None).score(found.teacher)
    for original, theirs, rows, (problem, worked, _) in zip(batch, found.teacher, scored, drawn, strict=True):
        n, room = len(original.response), longest - len(original.response)
        if n == 0 or room < 1 or (drop and not worked.strip()):
            assert rows is None
            continue
        assert theirs.response == original.response
        # The teacher's prefix, made again from the texts alone.
        chat = [{"role": "user", "content": f"{worked.strip()}|{problem}"}]
        whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        prefix = whole[-room:] if tail else whole[:room]
        logits = dense_logits(reader, prefix, original.response)
        assert rows.logits.shape == (n, 32)
        torch.testing.assert_close(rows.logits, logits.gather(1, rows.indices.long()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            rows.logits.sort(descending=True).values, logits.topk(32).values, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(rows.logsumexp, logits.logsumexp(1), rtol=1e-4, atol=1e-4)


# --- what the student learns --------------------------------------------------------------------------------


def learnable(tokenizer, count=6):
    chat = [{"role": "user", "content": "Sam has 53 apples. Eva has 38."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    made = []
    for index in range(count):
        one = rollout(tokenizer, text, f"5{index}-38: ones 13-8=5, tens 5-3-1=1", index, columns=(("worked", "15"),))
        made.append(replace(one, prompt=replace(one.prompt, problem=chat[0]["content"])))
    return made


@pytest.mark.parametrize("source", ["base_model", "live", "ema"])
def test_a_teacher_who_reads_no_more_teaches_nothing(arithmetic, tokenizer, source):
    """A template that renders the student's own prompt and an empty trace: KL 0 and gradient 0 at the first step."""
    context = {"teacher_prefix_template": "{problem}{trace}", "frozen_teacher_source": source}
    loss = {"kl_type": "reverse", "outside_topk": "bucket"}
    config = recipe(arithmetic, context, loss_fn=loss)
    batch = learnable(tokenizer)
    found = TeacherPrompts(config.distillation.context_distillation, tokenizer, None, 200)(batch)
    assert [one.prompt.tokens for one in found.teacher] == [one.prompt.tokens for one in batch]
    assert found.metrics["context_distillation_trace_coverage"] == 0.0
    student = Student(config, CPU, None)
    teacher = Teacher(config, CPU, None, shared=student if shares_student(config) else None)
    targets = teacher.score(found.teacher)
    # Ordinary self-distillation: the same checkpoint on the student's own rollouts.
    for ours, ordinary in zip(targets, Teacher(config, CPU, None).score(batch), strict=True):
        assert torch.equal(ours.indices, ordinary.indices) and torch.equal(ours.logits, ordinary.logits)
    assert student.divergences(found.student, targets)["kl"] == pytest.approx(0.0, abs=1e-6)
    trained = student.train(found.student, targets)
    assert trained["train/loss"] == pytest.approx(0.0, abs=1e-6)
    assert trained["train/grad_norm"] == pytest.approx(0.0, abs=1e-5)
    # And one who reads a trace does teach.
    shown = TeacherPrompts(
        recipe(arithmetic, {**context, **STATIC}).distillation.context_distillation, tokenizer, None, 200
    )(batch)
    assert Student(config, CPU, None).train(shown.student, teacher.score(shown.teacher))["train/grad_norm"] > 1e-2


def test_dropped_samples_weigh_nothing(arithmetic, tokenizer):
    """Training on a batch with dropped samples is training on the rest alone, for every optimizer step of it."""
    context = {**STATIC, "trace_extractor": {"missing_trace_policy": "drop_sample"},
               "teacher_prefix_template": "{problem}\nWorked: {trace}"}  # fmt: skip
    batch = learnable(tokenizer)
    for lost in (1, 4, 5):
        batch[lost] = replace(batch[lost], prompt=replace(batch[lost].prompt, columns=()))

    def train(rollouts, size):
        config = recipe(arithmetic, context, policy={"train_global_batch_size": size})
        found = TeacherPrompts(config.distillation.context_distillation, tokenizer, None, 200)(rollouts)
        student = Student(config, CPU, None)
        metrics = student.train(found.student, Teacher(config, CPU, None).score(found.teacher))
        return metrics, student.version, [p.detach().clone() for p in student.parameters]

    whole, _, weights = train(batch, 6)
    rest, _, alone = train([batch[i] for i in (0, 2, 3)], 3)
    assert whole == pytest.approx(rest, rel=1e-5) and whole["train/global_valid_toks"] > 0
    for ours, theirs in zip(weights, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # Optimizer steps of two: the third has lost both, and is no step.
    assert train(batch, 2)[1] == 2
    # Nothing at all is left: no step, no crash.
    nothing, version, _ = train([batch[1], batch[4]], 2)
    assert version == 0 and set(nothing) == {"train/lr"}


# --- teachers that move -------------------------------------------------------------------------------------


def moved(arithmetic, tokenizer, source, decay=0.75, steps=3, **policy):
    context = {**STATIC, "teacher_prefix_template": "{problem}\nWorked: {trace}", "frozen_teacher_source": source,
               "ema_decay": decay}  # fmt: skip
    optimizer = {"optimizer": {"name": "AdamW", "kwargs": {"lr": 1e-3}}}
    config = recipe(arithmetic, context, policy={**optimizer, **policy})
    student = Student(config, CPU, None)
    teacher = Teacher(config, CPU, None, shared=student if shares_student(config) else None)
    found = TeacherPrompts(config.distillation.context_distillation, tokenizer, None, 200)(learnable(tokenizer))
    history = [[p.detach().clone() for p in student.parameters]]
    for _ in range(steps):
        student.train(found.student, teacher.score(found.teacher))
        history.append([p.detach().clone() for p in student.parameters])
    return student, teacher, found, history


ADAPTERS = {"dtensor_cfg": {"lora_cfg": {"enabled": True, "dim": 4, "dropout": 0.1}}}


@pytest.mark.parametrize("policy", [{}, ADAPTERS], ids=["full", "lora"])
def test_an_ema_teacher_is_the_mean_of_the_students_so_far(arithmetic, tokenizer, policy):
    student, teacher, found, history = moved(arithmetic, tokenizer, "ema", 0.75, **policy)
    expected = history[0]
    for weights in history[1:]:
        expected = [0.75 * mean + 0.25 * weight for mean, weight in zip(expected, weights, strict=True)]
    for mean, wanted in zip(student.mean.means.values(), expected, strict=True):
        torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-7)
    scored = teacher.score(found.teacher)
    # Scoring leaves the student as it was, bit for bit.
    assert all(torch.equal(p, last) for p, last in zip(student.parameters, history[-1], strict=True))
    # A student who has the mean for weights gives the same scores.
    with torch.no_grad():
        for parameter, mean in zip(student.parameters, expected, strict=True):
            parameter.copy_(mean)
    student.mean = None
    for ours, theirs in zip(scored, teacher.score(found.teacher), strict=True):
        torch.testing.assert_close(ours.logsumexp, theirs.logsumexp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", [{}, ADAPTERS], ids=["full", "lora"])
def test_a_live_teacher_is_the_student_now_and_a_frozen_one_is_not(arithmetic, tokenizer, policy):
    student, live, found, _ = moved(arithmetic, tokenizer, "live", **policy)
    assert live.model is student.model
    base = Teacher(recipe(arithmetic), CPU, None)
    now, then = live.score(found.teacher), base.score(found.teacher)
    assert any(not torch.equal(a.logits, b.logits) for a, b in zip(now, then, strict=True))
    student.lends_itself = False  # with adapters: off, so the base
    if policy:
        for a, b in zip(live.score(found.teacher), then, strict=True):
            torch.testing.assert_close(a.logits, b.logits)


def test_decay_zero_is_live_and_decay_one_is_frozen(arithmetic, tokenizer):
    _, live, found, history = moved(arithmetic, tokenizer, "live")
    _, at_once, _, same = moved(arithmetic, tokenizer, "ema", 0.0)
    assert all(torch.equal(a, b) for a, b in zip(history[-1], same[-1], strict=True))
    for a, b in zip(live.score(found.teacher), at_once.score(found.teacher), strict=True):
        assert torch.equal(a.logits, b.logits)
    _, _, _, frozen = moved(arithmetic, tokenizer, "base_model")
    _, _, _, never = moved(arithmetic, tokenizer, "ema", 1.0)
    assert all(torch.equal(a, b) for a, b in zip(frozen[-1], never[-1], strict=True))


def test_the_mean_is_part_of_the_state(arithmetic, tokenizer, tmp_path):
    student, _, _, _ = moved(arithmetic, tokenizer, "ema", 0.9)
    student.save(tmp_path / "state", False)
    assert student.saved(True)
    again, _, _, _ = moved(arithmetic, tokenizer, "ema", 0.9, steps=0)
    again.load(tmp_path / "state")
    for name, mean in student.mean.means.items():
        assert torch.equal(again.mean.means[name], mean)
    assert any(not torch.equal(mean, p) for mean, p in zip(again.mean.means.values(), again.parameters, strict=True))


# --- from the recipe ----------------------------------------------------------------------------------------


def test_the_shipped_recipe_asks_as_the_model_was_taught(root, arithmetic, monkeypatch):
    monkeypatch.syspath_prepend(arithmetic)
    import problems

    loaded = load_recipe(root / "recipes" / "context_arithmetic_cpu.yaml")
    assert loaded.recipe.distillation.context_distillation.teacher_prefix_template == problems.TRACE_PREFIX
    inputs = prepare(loaded)
    prompt = inputs.train.render([0], inputs.train.problems.rows[:1])[0]
    assert prompt.columns == (("solution", problems.read_problems(arithmetic / "train.jsonl")[0].solution),)
    assert dict(prompt.columns)["solution"] in inputs.teacher_prompts.example(prompt)


def test_a_template_file_is_read_where_the_recipe_is(tmp_path, arithmetic):
    (tmp_path / "prefix.txt").write_text("{problem} {op}{trace}\n")
    (tmp_path / "r.yaml").write_text(
        f"distillation: {{context_distillation: {{enabled: true, teacher_prefix_template: prefix.txt}}}}\n"
        f"policy: {{model_name: {arithmetic}/reader}}\nteacher: {{model_name: '${{policy.model_name}}'}}\n"
        f"data: {{train: {{data_path: {arithmetic}/train.jsonl, input_key: problem, output_key: answer}}}}\n"
    )
    config = locate(load_recipe(tmp_path / "r.yaml")).distillation.context_distillation
    assert config.teacher_prefix_template == "{problem} {op}{trace}" and config.columns == ("op",)


def test_a_column_that_is_not_there(root, tmp_path):
    column = "distillation.context_distillation.static_trace.answer_column"
    loaded = load_recipe(root / "recipes" / "context_arithmetic_cpu.yaml", [f"{column}=worked"])
    with pytest.raises(DataError, match=r"data\.train has no column 'worked'.*solution"):
        prepare(loaded)
    # Validation sets need not have it.
    (tmp_path / "v.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    inputs = prepare(
        load_recipe(root / "recipes" / "context_arithmetic_cpu.yaml", [f"data.validation.data_path={tmp_path}/v.jsonl"])
    )
    assert inputs.validation[0].columns == ()
