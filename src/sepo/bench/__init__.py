"""Token credit tested where its truth is known.

command.py    `sepo bench`
credit/       rules ranked by the headroom that they close on tasks with known truth
laboratory/   a language that can be enumerated, with exact values
"""
