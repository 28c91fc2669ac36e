"""Every merge method once more, in float64, whole tensors at a time, as its paper writes it down."""

import torch


def f64(weight):
    base = weight.base.double()
    return base, {m: v.double() - base for m, v in weight.members.items()}


def stat(weight, kind):
    return {m: v.double() for m, v in weight.statistics.get(kind, {}).items()}


def average(weights, scaling, parameters, examples):
    total = sum(scaling.values())
    return {w.name: sum(a / total * w.members[m].double() for m, a in scaling.items()) for w in weights}


def task_arithmetic(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        merged[w.name] = base + sum(a * tau[m] for m, a in scaling.items())
    return merged


def top(magnitudes, keep):
    """The `keep` largest of a vector; the earlier of equal ones."""
    order = sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))
    mask = torch.zeros(len(magnitudes), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask


def trimmed(weights, member, density, scope):
    """τ of one member by weight, trimmed over the model or in each tensor."""
    names = sorted(w.name for w in weights)
    tau = {w.name: (w.members[member].float() - w.base.float()) for w in weights}
    groups = [names] if scope == "global" else [[name] for name in names]
    kept = {}
    for group in groups:
        flat = torch.cat([tau[name].reshape(-1) for name in group])
        mask = top(flat.abs().tolist(), min(max(round(density * len(flat)), 1), len(flat)))
        flat = torch.where(mask, flat, 0.0).double()
        for name, part in zip(group, flat.split([tau[n].numel() for n in group]), strict=True):
            kept[name] = part.reshape(tau[name].shape)
    return kept


def elect(taus, scaling, disjoint):
    scaled = torch.stack([scaling[m] * taus[m] for m in scaling])
    sign = torch.sign(scaled.sum(0))
    agree = (scaled.sign() == sign) & (sign != 0)
    numerator = (scaled * agree).sum(0)
    if disjoint == "sum":
        return numerator
    size = torch.tensor([abs(a) for a in scaling.values()], dtype=torch.float64)
    count = (agree * size.reshape(-1, *[1] * (agree.dim() - 1))).sum(0)
    return torch.where(count > 0, numerator / count.clamp(min=1e-300), 0.0)


def ties(weights, scaling, parameters, examples):
    kept = {m: trimmed(weights, m, parameters["density"], parameters["trim"]) for m in scaling}
    return {
        w.name: w.base.double()
        + parameters["lambda"] * elect({m: kept[m][w.name] for m in scaling}, scaling, parameters["disjoint"])
        for w in weights
    }


def fisher(weights, scaling, parameters, examples):
    every = {
        m: torch.cat([stat(w, "fisher")[m].reshape(-1) for w in weights if stat(w, "fisher")])
        for m in scaling
    }
    scale = {m: 1 / f.norm() if parameters["normalize"] else 1.0 for m, f in every.items()}
    floor = 1e-6 * sum(scale[m] * every[m].mean() for m in scaling) / len(scaling)
    merged = {}
    for w in weights:
        found = stat(w, "fisher")
        f = {m: (found[m] * scale[m]).clamp(min=floor) if found else floor for m in scaling}
        upper = sum(scaling[m] * f[m] * w.members[m].double() for m in scaling)
        merged[w.name] = upper / sum(scaling[m] * f[m] for m in scaling)
    return merged


def gradient_matching(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        found = stat(w, "fisher")
        h = {m: examples.get(m, 1) * found[m] if found else 0.0 for m in scaling}
        h0 = parameters["delta"]
        if parameters["base_curvature"] == "fisher" and found:
            h0 = h0 + examples.get("base", 1) * found["base"]
        lower = h0 + sum(scaling[m] * h[m] for m in scaling)
        if parameters["clamp"]:
            lower = torch.as_tensor(lower, dtype=torch.float64).clamp(min=parameters["delta"])
        merged[w.name] = base + sum(scaling[m] * (h0 + h[m]) * tau[m] for m in scaling) / lower
    return merged


def regmean(weights, scaling, parameters, examples):
    merged, rho = {}, parameters["rho"]
    inside = scaling if parameters["factors"] == "gram" else dict.fromkeys(scaling, 1.0)
    for w in weights:
        base, tau = f64(w)
        grams = stat(w, "gram")
        outside = dict.fromkeys(scaling, 1.0) if parameters["factors"] == "gram" else scaling
        if not grams:
            merged[w.name] = base + sum(outside[m] * tau[m] for m in scaling) / len(scaling)
            continue
        soft = {m: rho * grams[m] + (1 - rho) * torch.diag(torch.diag(grams[m])) for m in scaling}
        left = sum(inside[m] * soft[m] for m in scaling)
        turned = {m: tau[m] if w.transposed else tau[m].T for m in scaling}
        moved = torch.linalg.solve(left, sum(inside[m] * outside[m] * soft[m] @ turned[m] for m in scaling))
        merged[w.name] = base + (moved if w.transposed else moved.T)
    return merged
