"""How the two views of an image, the action between them and the mask are drawn and made (IWM, section 3).

Nothing here imports torch except `device`: data tasks import the rest, and torch would cost each of them
seconds.
"""
