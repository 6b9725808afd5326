"""A page to try captioners on, and `POST /caption`, from one process: ``python -m efficap.demo run=RUN``.

    browser -- page.py --+
                         +--> service.py: a picture, checked --> batching.py: one queue --> a batch for the model
    client --- api.py ---+

`server.py` joins the two into one application and keeps the limits that hold for every request.
"""
