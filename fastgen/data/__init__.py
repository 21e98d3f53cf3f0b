"""Images, clips, labels and prompts: the bundled sets, a user's folders, and the batches made of them."""
