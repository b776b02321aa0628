"""Judging a model's answers: answers to benchmarks, verdicts of a judge, and the scores that the benchmarks define.

questions           benchmarks' questions and answers, in each benchmark's own format
answering           answers by Transformers, vLLM or a server, resumable
steering            a start with an oracle's token rewards added to its logits
prompts             questions and answers -> token ids
judge               two models' answers to the same questions -> verdicts, grades, annotations
scorers  classifier judges that score an answer: a reward model, a Python function
oracle_judge        a DPO oracle as such a judge
server_judge        a language model behind a server as judge
judge_prompts       its prompts, and how its replies are read
endpoint            a server's replies: cached by content, counted, estimated
client  replies     requests through the `openai` client, and what comes back
judgements          files of judgements -> scores
winrate  logistic   AlpacaEval's win rate, raw and length-controlled; the regression behind it
benchmark_scores    MT-Bench's and Arena-Hard's scores
in_run  benchmarks  the judge and the benchmarks of a run
tasks               forgetting, measured by lm-evaluation-harness
stages              the stages of a run that judge or test a policy
commands            `sepo generate`, `sepo judge`, `sepo winrate`
"""

from sepo.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "Endpoint": "sepo.judging.endpoint",
        "arena_scores": "sepo.judging.benchmark_scores",
        "function_scorer": "sepo.judging.scorers",
        "length_controlled": "sepo.judging.winrate",
        "mt_bench_scores": "sepo.judging.benchmark_scores",
        "read_answers": "sepo.judging.questions",
        "read_questions": "sepo.judging.questions",
        "reward_scorer": "sepo.judging.scorers",
        "score_files": "sepo.judging.judgements",
        "win_rate": "sepo.judging.winrate",
    },
)
