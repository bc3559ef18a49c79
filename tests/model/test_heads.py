import torch

from iwm_ray.model.heads import AttentiveHead, LinearHead


def test_the_linear_head_reads_the_mean_token():
    torch.manual_seed(0)
    head, tokens = LinearHead(8, 3), torch.randn(16, 5, 8)
    assert torch.equal(head.eval()(tokens), head(tokens.mean(1)))


def test_the_linear_head_does_not_depend_on_scale_and_offset_of_the_features():
    torch.manual_seed(0)
    head, features = LinearHead(8, 3).train(), torch.randn(16, 8)
    torch.testing.assert_close(head(features), head(features * 100 + 7), rtol=1e-4, atol=1e-4)


def test_the_attentive_head_does_not_depend_on_the_order_of_the_tokens():
    torch.manual_seed(0)
    head, tokens = AttentiveHead(8, 3, 2), torch.randn(4, 6, 8)
    torch.testing.assert_close(head(tokens), head(tokens[:, torch.randperm(6)]))


def test_the_attentive_head_can_read_what_the_mean_hides():
    """Which of two classes: the sign of a token of random place among tokens that cancel it in the mean."""
    torch.manual_seed(0)
    labels = torch.arange(256) % 2
    sign = (2.0 * labels - 1)[:, None]
    tokens = torch.randn(256, 6, 8) * 0.1
    tokens[:, 0, 0], tokens[:, 0, 1:2] = 3, sign
    tokens[:, 1, 1:2] = -sign
    tokens = torch.stack([sample[torch.randperm(6)] for sample in tokens])
    head = AttentiveHead(8, 2, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(tokens), labels).backward()
        optimizer.step()
    assert (head(tokens).argmax(1) == labels).float().mean() > 0.95
