"""The web chat: `eagle-moe web --model DIR`. Questions about images, with experts switched off.

server.py      address, limits on what comes in, start and end
page.py        what is on the page, and what happens on a click
talk.py        one visitor's conversation: answers with every expert and without some
added.py       what each expert added to an answer, as a piece of HTML
pictures.py    example questions, and the images of a reference set
"""
