"""Token credit tested where its truth is known.

command.py    `sepo bench`
laboratory/   a language that can be enumerated, with exact values
"""
