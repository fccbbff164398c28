"""Standard deviations of float32's rounding errors, for any order of additions: a floor under every bound.

The rule of attention_checks.py scales a bound by the error of plain PyTorch in the same run. If that error happens to
be small, another BLAS, vector width or thread count turns a correct result into a failure. These floors depend on the
inputs alone. They follow each formula in float64, together with the variance of the rounding error:

- Rounding a number once gives an error of at most u |x|, u = 2^-24 in float32. Triton's interpreter rounds
  `s * scale - m`, which a GPU fuses, twice: u |s scale| and u |s scale - m|.
- A sum of n terms t in any order rounds n partial sums. A partial sum is about as large as the root of sum(t^2) if
  signs differ, and at most the sum S if they agree: u sqrt(n) sqrt(sum(t^2) + S^2).
- exp turns the error of its argument into a relative error.
- Errors of different origin are independent, so their variances add. An error that a whole row shares (those of lse and
  delta) is followed as one error of the row.

The rule allows four deviations for the largest error, about the largest of ten thousand errors, and two for the root
mean square.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_reference import alibi_term, dropout_keep, visible_pairs
from kernels.bias import SMALL, add_bias, row_shift

FEW = 3.0  # rounding steps of exp, tanh, log or a change of base


def unit_of(dtype: torch.dtype) -> float:
    """Return the rounding error of 1: kernels compute float64 in float64 and every other dtype in float32."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def sum_variance(n: int, squares: Tensor, total: Tensor) -> Tensor:
    """Return the variance of sums of n terms, in units of u^2; `squares`: sums of the squared terms, `total`: sums."""
    return max(1, n) * (squares + total.square())


def product_variance(a: Tensor, b: Tensor) -> Tensor:
    """Return the variance that the additions of a @ b cause, in units of u^2."""
    return sum_variance(a.shape[-1], a.square() @ b.square(), a @ b)


def deviations(variances: dict[str, Tensor], unit: float) -> dict[str, Tensor]:
    """Turn variances in units of unit^2 into standard deviations."""
    return {name: unit * variance.sqrt() for name, variance in variances.items()}


def capped(s: Tensor, variance: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return softcap * tanh(s / softcap), its variance and its derivative."""
    if not softcap:
        return s, variance, torch.ones_like(s)
    t = torch.tanh(s / softcap)
    slope = 1 - t * t
    return softcap * t, variance * slope.square() + (FEW * softcap) ** 2, slope


class Weights:
    """Attention's weights in float64, heads before positions, with their variances in units of u^2.

    p (B, H, Tq, Tk): the weights. s_variance: the relative variance of each weight alone. lse_variance (B, H, Tq, 1):
    the variance of lse, which all weights of a row share. With a bias, lse does not include shift (B, H, Tq, 1).
    """

    def __init__(self, q, k, v, *, mask, segment_ids, scale, softcap, alibi_slopes, bias, sinks, dropout_p, seed):
        B, Tq, H, D = q.shape
        Tk, self.group = k.shape[1], H // k.shape[2]
        self.scale = D**-0.5 if scale is None else scale
        self.q = q.transpose(1, 2)
        self.k, self.v = (x.repeat_interleave(self.group, dim=2).transpose(1, 2) for x in (k, v))
        s = self.scale * (self.q @ self.k.mT)
        variance = self.scale**2 * product_variance(self.q, self.k.mT) + s.square()
        s, variance, self.slope = capped(s, variance, softcap)
        if alibi_slopes is not None:
            term = alibi_term(alibi_slopes, Tq, Tk)
            s = s + term
            variance = variance + s.square() + term.square()
        visible = visible_pairs(mask, segment_ids, Tq, Tk, q.device)
        # The sink is one more logit without a value.
        sinks = torch.full((H,), -math.inf, dtype=s.dtype, device=s.device) if sinks is None else sinks
        sinks = sinks.view(1, H, 1, 1).expand(B, H, Tq, 1)
        self.shift = torch.zeros_like(sinks)
        if bias is not None:
            # Each row's largest bias is subtracted; a small bias may also be added directly.
            self.shift = row_shift(bias, visible, sinks)
            s = add_bias(s, bias, self.shift)
            variance = variance + s.square() + (bias - self.shift).square() + bias.clamp(-SMALL, SMALL).square()
            sinks = sinks - self.shift
        s = s.masked_fill(~visible, -math.inf)
        self.lse = torch.cat([s, sinks], dim=3).logsumexp(3, keepdim=True)
        lse = self.lse.masked_fill(self.lse == -math.inf, 0.0)
        self.p, self.p_sink = (s - lse).exp(), (sinks - lse).exp()
        # Subtracting the pivot rounds twice, exp once more; the pivot is at most log(Tk + 1) below lse.
        pivot = lse.abs() + math.log(Tk + 1)
        self.s_variance = (variance + s.square() + (s.abs() + pivot).square() + FEW**2).masked_fill(self.p == 0, 0.0)
        sink_variance = ((sinks.abs() + pivot).square() + FEW**2).masked_fill(self.p_sink == 0, 0.0)
        self.lse_variance = (self.p.square() * self.s_variance).sum(3, keepdim=True)
        self.lse_variance += self.p_sink.square() * sink_variance + Tk + FEW**2 * (1 + lse.square())
        self.sink_variance = self.p_sink.square() * (sink_variance + self.lse_variance)
        self.kept = torch.ones_like(s)
        if dropout_p:
            self.kept = dropout_keep(dropout_p, seed, s.shape, q.device) / (1 - dropout_p)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Return out (B, H, Tq, Dv) and its variance."""
        weights = self.p * self.kept
        out = weights @ self.v
        variance = (weights.square() * self.s_variance) @ self.v.square() + product_variance(weights, self.v)
        return out, variance + out.square() * (self.lse_variance + FEW**2)

    def whole_lse_variance(self) -> Tensor:
        """Return the variance of lse + shift (B, H, Tq)."""
        whole = (self.lse.masked_fill(self.lse == -math.inf, 0.0) + self.shift).square() * (self.shift != 0)
        return (self.lse_variance + whole)[..., 0]


def attention_deviation(inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the deviations of the results of attention_checks.run: out, lse and each gradient."""
    features = dict.fromkeys(("segment_ids", "softcap", "alibi_slopes", "bias", "sinks", "seed")) | {"dropout_p": 0.0}
    given = features | {name: in_double(x) for name, x in (inputs.arguments | inputs.differentiable).items()}
    w = Weights(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    dout, dlse = inputs.dout.double().transpose(1, 2), inputs.dlse.double()[..., None]
    out, out_variance = w.outputs()

    # ds = p (dp - delta + dlse): each ds has its own variance; those of delta and lse are shared by a row.
    dp = (dout @ w.v.mT) * w.kept
    delta = (out * dout).sum(3, keepdim=True)
    inner = dp - delta + dlse
    ds = w.p * inner
    delta_variance = ((w.p * dp).square() * w.s_variance).sum(3, keepdim=True) + delta.square() * w.lse_variance
    delta_variance += (product_variance(w.p * w.kept, w.v) * dout.square()).sum(3, keepdim=True)
    delta_variance += sum_variance(dout.shape[3], (out * dout).square().sum(3, keepdim=True), delta) + dlse.square()
    ds_variance = product_variance(dout, w.v.mT) * w.kept.square() + dp.square() + inner.square()
    ds_variance = w.p.square() * ds_variance + ds.square() * (w.s_variance + FEW**2)

    variances = {"out": out_variance.transpose(1, 2), "lse": w.whole_lse_variance()}
    own = ds_variance * w.slope.square() + (FEW * ds).square()  # of ds * slope
    ds0 = ds * w.slope
    dq = own @ w.k.square() + product_variance(ds0, w.k)
    dq += delta_variance * (w.p * w.slope @ w.k).square() + w.lse_variance * (ds0 @ w.k).square()
    own = own + delta_variance * (w.p * w.slope).square() + w.lse_variance * ds0.square()
    dk = own.mT @ w.q.square() + product_variance(ds0.mT, w.q)
    weights = w.p * w.kept
    dv = (weights.square() * (w.s_variance + w.lse_variance)).mT @ dout.square() + product_variance(weights.mT, dout)
    variances["dq"] = w.scale**2 * dq.transpose(1, 2)
    for name, variance in (("dk", w.scale**2 * dk), ("dv", dv)):
        # The heads of a group are summed.
        variances[name] = w.group * variance.unflatten(1, (-1, w.group)).sum(2).transpose(1, 2)
    if given["bias"] is not None:
        variances["dbias"] = bias_variance(given["bias"], w, ds, ds_variance, delta_variance)
    if given["sinks"] is not None:
        dsinks = w.p_sink * (delta - dlse)
        variance = w.sink_variance * (delta - dlse).square() + w.p_sink.square() * (delta_variance + delta.square())
        n = dsinks[:, 0].numel()
        variances["dsinks"] = variance.sum((0, 2, 3)) + sum_variance(
            n, dsinks.square().sum((0, 2, 3)), dsinks.sum((0, 2, 3))
        )
    return deviations(variances, unit_of(dtype))


def bias_variance(bias: Tensor, w: Weights, ds: Tensor, ds_variance: Tensor, delta_variance: Tensor) -> Tensor:
    """Return the variance of ds summed over the broadcast axes; a row's shared errors add up along keys as one."""
    p, row = w.p, ds
    if bias.shape[-1:] in ((), (1,)):
        p, row = p.sum(3, keepdim=True), ds.sum(3, keepdim=True)
    shared = p.square() * delta_variance + row.square() * w.lse_variance
    n = ds.numel() // max(1, bias.numel())
    variance = ds_variance.sum_to_size(bias.shape) + shared.sum_to_size(bias.shape)
    return variance + sum_variance(n, ds.square().sum_to_size(bias.shape), ds.sum_to_size(bias.shape))


def in_double(x):
    """Convert floating tensors to float64 and leave everything else alone."""
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def attend_deviation(q, k, v, *, return_lse=True, **features) -> tuple[Tensor, Tensor]:
    """Return the deviations of out (B, Tq, H, Dv) and lse (B, H, Tq) of a float32 call, from its float64 arguments."""
    given = dict.fromkeys(("segment_ids", "bias", "seed")) | {"dropout_p": 0.0} | features
    w = Weights(q, k, v, **{name: in_double(x) for name, x in given.items()})
    variances = {"out": w.outputs()[1].transpose(1, 2), "lse": w.whole_lse_variance()}
    return tuple(deviations(variances, unit_of(torch.float32)).values())


def loss_deviation(
    x, weight, targets, dlosses, dtype, *, softcap=0.0, z_loss=0.0, label_smoothing=0.0
) -> dict[str, Tensor]:
    """Return the deviations of linear_cross_entropy: of each loss, and of the gradients of sum(dlosses * losses).

    x (N, C), weight (V, C), targets (N,), dlosses (N,); targets below 0 are ignored.
    """
    x, weight, dlosses = x.double(), weight.double(), dlosses.double()[:, None]
    V, counts, index = weight.shape[0], (targets >= 0)[:, None], targets.clamp(min=0)[:, None]
    s = x @ weight.T
    s, s_variance, slope = capped(s, product_variance(x, weight.T), softcap)
    lse = s.logsumexp(1, keepdim=True)
    p = (s - lse).exp()
    s_variance = s_variance + s.square() + (s - lse).square() + FEW**2
    lse_variance = (p.square() * s_variance).sum(1, keepdim=True) + V + FEW**2 * (1 + lse.square())
    s_target, factor = s.gather(1, index), 1 + 2 * z_loss * lse
    loss = factor.square() * lse_variance + s_variance.gather(1, index) + (FEW * z_loss * lse.square()).square()
    loss += FEW**2 * (lse.square() + s_target.square())
    loss += label_smoothing**2 * (s_variance.mean(1, keepdim=True) + V * s.square().mean(1, keepdim=True))
    # The gradient of a logit is factor * p minus the share of the target and the smoothing.
    wanted = torch.full_like(s, label_smoothing / V).scatter_add(1, index, torch.ones_like(lse) * (1 - label_smoothing))
    ds = (factor * p - wanted) * slope * counts * dlosses
    own = (factor * p).square() * (s_variance + FEW**2) + wanted.square() + FEW**2 * (factor * p - wanted).square()
    own = own * (slope * counts * dlosses).square()
    shared = (factor.abs() + 2 * z_loss) * p * slope * counts * dlosses  # times the error of lse
    own_of_columns = own + shared.square() * lse_variance
    dx = own @ weight.square() + lse_variance * (shared @ weight).square() + product_variance(ds, weight)
    dweight = own_of_columns.T @ x.square() + product_variance(ds.T, x)
    return deviations({"loss": (loss * counts)[:, 0], "dx": dx, "dweight": dweight}, unit_of(dtype))


@torch.no_grad()
def model_deviation(model, idx: Tensor, draws: int = 4) -> float:
    """Bound the rounding error of a GPT's log-probabilities of idx (B, T) in float32, for a model in float64.

    Every output of a linear layer or norm, and every input of c_proj, gets a random error as large as its rounding. The
    bound is four times the largest change of the log-probabilities.
    """
    generator = torch.Generator().manual_seed(0)

    def disturbed(x: Tensor, variance: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x + unit_of(torch.float32) * variance.sqrt() * noise

    def noisy_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        return disturbed(y, product_variance(x, weight.T) + (FEW * y).square())

    def after(norm, inputs, output):
        return disturbed(output, (FEW * output).square())

    def before(module, inputs):
        return disturbed(inputs[0], idx.shape[1] * FEW**2 * inputs[0].square().mean(-1, keepdim=True))

    exact = model(idx).log_softmax(-1)
    kinds, linear = (torch.nn.LayerNorm, torch.nn.RMSNorm), F.linear
    hooks = [m.register_forward_hook(after) for m in model.modules() if isinstance(m, kinds)]
    hooks += [block.attn.c_proj.register_forward_pre_hook(before) for block in model.blocks]
    F.linear = noisy_linear  # every linear layer calls it
    try:
        changes = [float((model(idx).log_softmax(-1) - exact).abs().max()) for _ in range(draws)]
    finally:
        F.linear = linear
        for hook in hooks:
            hook.remove()
    return 4 * max(changes)
