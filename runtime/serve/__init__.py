"""An engine behind a websocket, and the client for it: the openpi protocol, without pickle.

Needs the ``serve`` extra (websockets, prometheus-client); the rest of the runtime does not import it.
"""
