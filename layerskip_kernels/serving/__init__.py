"""The OpenAI HTTP API over one Engine.

protocol: what may be asked. worker: the thread that steps the engine. app: the routes. job, answers: what goes back.
"""
