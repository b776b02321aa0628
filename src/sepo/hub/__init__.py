"""Publishing: a run's models and token rewards on the Hugging Face hub.

command.py   `sepo push`
merge.py     `sepo merge`: an adapter and its base as one model
push.py      what to upload, and the upload
card.py      model and dataset cards, filled into the templates *_card.md
"""

from sepo.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "merge_adapter": "sepo.hub.merge",
        "plan": "sepo.hub.push",
        "upload": "sepo.hub.push",
        "write_policy_card": "sepo.hub.card",
    },
)
