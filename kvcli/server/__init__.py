"""The HTTP face of the engine: OpenAI's completions and chat, and what operators look at.

    app = create_app(engine, ServedModel("my-model", tokenizer, vocabulary), Settings())

`app.py` puts it together. `routes.py` holds the endpoints, `schemas.py` what they take and give, `answers.py` the way
to the engine and back, `replies.py` and `streaming.py` the shape of what goes out, `guard.py` what every request passes
first, `process.py` the process's life and end. `load.py` is the other side: a crowd of clients.
"""
