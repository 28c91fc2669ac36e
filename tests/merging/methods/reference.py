"""Every merge method once more, in float64, whole tensors at a time, as its paper writes it down."""

import hashlib

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


def top(magnitudes, keep, numbers):
    """The `keep` largest of a vector; of equal ones, those with a random number below the share that is wanted."""
    least = magnitudes.sort(descending=True).values[keep - 1]
    above, equal = magnitudes > least, magnitudes == least
    share = round(float((keep - above.sum()) / equal.sum()) * 65536) / 65536
    return above | (equal & (numbers < share))


def trimmed(weights, member, density, scope):
    """τ of one member by weight, trimmed over the model or in each tensor."""
    names = sorted(w.name for w in weights)
    tau = {w.name: (w.members[member].float() - w.base.float()) for w in weights}
    groups = [names] if scope == "global" else [[name] for name in names]
    kept = {}
    for group in groups:
        flat = torch.cat([tau[name].reshape(-1) for name in group])
        numbers = torch.cat([uniform(0, "", name, tau[name]).reshape(-1) for name in group])
        mask = top(flat.abs(), min(max(round(density * len(flat)), 1), len(flat)), numbers)
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


def own(parameters, name, member):
    return parameters.get(f"{name}@{member}", parameters[name])


def ties(weights, scaling, parameters, examples):
    kept = {m: trimmed(weights, m, own(parameters, "density", m), parameters["trim"]) for m in scaling}
    return {
        w.name: w.base.double()
        + parameters["lambda"] * elect({m: kept[m][w.name] for m in scaling}, scaling, parameters["disjoint"])
        for w in weights
    }


def fisher(weights, scaling, parameters, examples):
    every = {m: torch.cat([stat(w, "fisher")[m].reshape(-1) for w in weights if stat(w, "fisher")]) for m in scaling}
    scale = {m: 1 / f.norm() if parameters["normalize"] else 1.0 for m, f in every.items()}
    floor = 1e-6 * sum(scale[m] * every[m].mean() for m in scaling) / len(scaling)
    merged = {}
    for w in weights:
        result = stat(w, "fisher")
        f = {m: (result[m] * scale[m]).clamp(min=floor) if result else floor for m in scaling}
        upper = sum(scaling[m] * f[m] * w.members[m].double() for m in scaling)
        merged[w.name] = upper / sum(scaling[m] * f[m] for m in scaling)
    return merged


def gradient_matching(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        result = stat(w, "fisher")
        h = {m: examples.get(m, 1) * result[m] if result else 0.0 for m in scaling}
        h0 = parameters["delta"]
        if parameters["base_curvature"] == "fisher" and result:
            h0 = h0 + examples.get("base", 1) * result["base"]
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
        power = {m: torch.diag(grams[m]) for m in scaling}
        beta = {m: parameters.get("beta", 0.0) * power[m].mean() * torch.ones_like(power[m]) for m in scaling}
        soft = {m: rho * grams[m] + torch.diag((1 - rho) * power[m] + beta[m]) for m in scaling}
        left = sum(inside[m] * soft[m] for m in scaling)
        turned = {m: tau[m] if w.transposed else tau[m].T for m in scaling}
        moved = torch.linalg.solve(left, sum(inside[m] * outside[m] * soft[m] @ turned[m] for m in scaling))
        merged[w.name] = base + (moved if w.transposed else moved.T)
    return merged


def linear(weights, scaling, parameters, examples):
    total = sum(scaling.values()) if parameters["normalize"] else 1.0
    return {w.name: sum(a / total * w.members[m].double() for m, a in scaling.items()) for w in weights}


def uniform(seed, member, name, like):
    """Sixteen random bits an entry: the generator, its seed and its place are part of what dare and della promise."""
    digest = hashlib.sha256(f"{seed}\0{member}\0{name}".encode()).digest()
    key, other = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    numbers = []
    for pair in range(like.numel() // 2 + 1):
        x = (pair ^ key) & 0xFFFFFFFF
        x = (x ^ x >> 17) * 0xED5AD4BB & 0xFFFFFFFF
        x ^= other + (pair >> 32) & 0xFFFFFFFF
        x = (x ^ x >> 11) * 0xAC4C1B51 & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x31848BAB & 0xFFFFFFFF
        x ^= x >> 14
        numbers += [x & 0xFFFF, x >> 16]
    return torch.tensor(numbers[: like.numel()], dtype=torch.float64).reshape(like.shape) / 65536


def merged_entries(base, taus, scaling, parameters):
    entries, scale = parameters["entries"], parameters["lambda"]
    if entries == "all":
        return base + scale * sum(a * taus[m] for m, a in scaling.items())
    return base + scale * elect(taus, scaling, "mean" if entries == "elected_mean" else "sum")


def rescaled(tau, mask, keep, rescale):
    """What is kept, divided by its probability or brought to the norm of all."""
    kept = mask * tau
    if rescale == "l1":
        return kept * tau.abs().sum() / kept.abs().sum() if kept.abs().sum() > 0 else kept
    return kept / keep if rescale == "probability" else kept


def dare(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        kept = {}
        for m in scaling:
            p = round(own(parameters, "drop", m) * 65536) / 65536
            mask = uniform(parameters["seed"], m, w.name, base) >= p
            kept[m] = rescaled(tau[m], mask, 1 - p, parameters["rescale"])
        merged[w.name] = merged_entries(base, kept, scaling, parameters)
    return merged


def della(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        kept = {}
        for m in scaling:
            rows = tau[m].reshape(-1, tau[m].shape[-1] if tau[m].dim() else 1)
            smaller = (rows.abs()[:, None, :] < rows.abs()[:, :, None]).sum(2)
            equal = (rows.abs()[:, None, :] == rows.abs()[:, :, None]).sum(2)
            rank = (smaller + (equal - 1) / 2).double() / max(rows.shape[1] - 1, 1) if rows.shape[1] > 1 else equal / 2
            keep = own(parameters, "density", m) + own(parameters, "epsilon", m) * (2 * rank.reshape(base.shape) - 1)
            mask = uniform(parameters["seed"], m, w.name, base) < keep
            kept[m] = rescaled(tau[m], mask, keep, parameters["rescale"])
        merged[w.name] = merged_entries(base, kept, scaling, parameters)
    return merged


def breadcrumbs(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        size = base.numel()
        kept = {}
        for m in scaling:
            flat = w.members[m].float().reshape(-1) - w.base.float().reshape(-1)
            numbers = uniform(0, "", w.name, flat)
            gamma = own(parameters, "gamma", m)
            most = max(round(min(own(parameters, "density", m) + gamma, 1.0) * size), 1)
            outliers = round(gamma * size)
            mask = top(flat.abs(), most, numbers)
            if outliers:
                mask &= ~top(flat.abs(), outliers, numbers)
            kept[m] = torch.where(mask, tau[m].reshape(-1), 0.0).reshape(base.shape)
        merged[w.name] = merged_entries(base, kept, scaling, parameters)
    return merged


def consensus(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        whole = sum(tau[m] for m in scaling)
        votes = sum((tau[m].abs() > parameters["lambda"] * (whole - tau[m]).abs()).double() for m in scaling)
        mask = votes >= min(parameters["k"], len(scaling))
        merged[w.name] = base + mask * sum(a * tau[m] for m, a in scaling.items())
    return merged


def f32(weight):
    """Task vectors as float32 knows them, which thresholds are compared with."""
    return {m: (v.float() - weight.base.float()).double() for m, v in weight.members.items()}


def nearswap(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        moved = {m: torch.minimum(parameters["t"] / tau[m].abs(), torch.tensor(1.0)) * tau[m] for m in scaling}
        merged[w.name] = base + sum(a * torch.nan_to_num(moved[m]) for m, a in scaling.items())
    return merged


def arcee_fusion(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        total = torch.zeros_like(base)
        for m, a in scaling.items():
            p, q = (torch.softmax(v.double(), dim=-1) + 1e-8 for v in (w.members[m], w.base))
            importance = (tau[m].abs() * (p * torch.log(p / q)).sum(-1, keepdim=base.dim() > 0)).reshape(-1)
            ordered = importance.sort().values
            low, middle, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
            total += a * (importance >= middle + 1.5 * (high - low)).reshape(base.shape) * tau[m]
        merged[w.name] = base + total
    return merged


def ram(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        tau = f32(w)
        moved = {m: (tau[m].abs() > parameters["epsilon"]).double() for m in scaling}
        count = sum(moved.values())
        total = torch.zeros_like(tau[min(tau)])
        for m, a in scaling.items():
            shared, own = (moved[m] * (count > 1)).sum(), (moved[m] * (count == 1)).sum()
            ratio = min(float(shared / own.clamp(min=1)), parameters.get("alpha", 0.0))
            scale = torch.where(count == 1, 1 + parameters.get("r", 0.0) * ratio, 1.0)
            total += a * scale * moved[m] * tau[m] / count.clamp(min=1)
        merged[w.name] = w.base.double() + total
    return merged


ram_plus = ram


def sce(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        tau = f32(w)
        stack = torch.stack([tau[m].reshape(-1) for m in sorted(scaling)])
        spread = len(stack) * stack.square().sum(0) - stack.sum(0).square()
        spread = torch.where(spread <= 1e-12 * len(stack) * stack.square().sum(0), 0.0, spread).float()
        some = int((spread > 0).sum())
        mask = torch.ones_like(spread, dtype=torch.bool)
        if not parameters["select"]:
            mask = torch.zeros_like(mask)
        elif some and parameters["select"] < 1:
            keep = min(max(round(parameters["select"] * some), 1), some)
            mask = top(spread, keep, uniform(0, "", w.name, spread))
        stack = stack * mask
        factors = torch.tensor([scaling[m] for m in sorted(scaling)], dtype=torch.float64)[:, None]
        sign = torch.sign((factors * stack).sum(0))
        share = factors * stack.square().sum(1, keepdim=True) * ((stack.sign() == sign) & (sign != 0))
        moved = torch.nan_to_num((share * stack).sum(0) / share.sum(0))
        merged[w.name] = w.base.double() + parameters["lambda"] * moved.reshape(w.base.shape)
    return merged


def lines(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        depth = 0.0 if w.name.startswith(("embeddings", "layer.0")) else 1.0  # the test pool has two layers
        merged[w.name] = base + (parameters["a"] + parameters["b"] * depth) * sum(
            a * tau[m] for m, a in scaling.items()
        )
    return merged


def slerp(weights, scaling, parameters, examples):
    merged = {}
    (a, b), t = sorted(scaling), scaling[max(scaling)] / sum(scaling.values())
    for w in weights:
        base, _ = f64(w)
        origin = 0.0 if parameters["space"] == "weights" else base
        x, y = w.members[a].double() - origin, w.members[b].double() - origin
        cosine = (x * y).sum() / (x.norm() * y.norm())
        angle = torch.arccos(cosine.clamp(-1, 1))
        if abs(cosine) > 0.9995:
            merged[w.name] = origin + (1 - t) * x + t * y
        else:
            merged[w.name] = origin + (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)
    return merged


def by(w, over, *values):
    """Weights as rows that have an angle each: one of all entries, one an output, or one an input."""
    if over == "tensor" or values[0].dim() < 2:
        return [v.reshape(1, -1) for v in values]
    return [v.T if w.transposed != (over == "columns") else v for v in values]


def unturned(w, over, rows):
    """The inverse of `by`."""
    if over == "tensor" or w.base.dim() < 2:
        return rows.reshape(w.base.shape)
    return rows.T if w.transposed != (over == "columns") else rows


def nuslerp(weights, scaling, parameters, examples):
    merged = {}
    (a, b), t = sorted(scaling), scaling[max(scaling)] / sum(scaling.values())
    for w in weights:
        base, _ = f64(w)
        origin = base if parameters["space"] == "task_vectors" else torch.zeros_like(base)
        x, y = by(w, parameters["over"], w.members[a].double() - origin, w.members[b].double() - origin)
        moved = torch.empty_like(x)
        for i, (p, q) in enumerate(zip(x, y, strict=True)):
            angle = torch.arccos(((p / p.norm()) @ (q / q.norm())).clamp(-1, 1))
            if torch.sin(angle) < 1e-6 or angle > 3.11:
                moved[i] = (1 - t) * p + t * q
            else:
                moved[i] = (torch.sin((1 - t) * angle) * p + torch.sin(t * angle) * q) / torch.sin(angle)
        merged[w.name] = origin + unturned(w, parameters["over"], moved)
    return merged


def spherical_mean(vectors, share):
    """At the vectors' mean length; the linear mean where two are opposite."""
    length = sum(share[m] * vectors[m].norm() for m in vectors)
    unit = {m: v / v.norm() for m, v in vectors.items() if v.norm() > 0}
    if not unit or min(float((u * v).sum()) for u in unit.values() for v in unit.values()) < -0.9995:
        return sum(share[m] * vectors[m] for m in vectors)
    share = {m: share[m] / sum(share[n] for n in unit) for m in unit}
    x = sum(share[m] * unit[m] for m in unit)
    x = x / x.norm()
    for _ in range(200):
        step = torch.zeros_like(x)
        for m in unit:
            cosine = (x * unit[m]).sum().clamp(-1, 1)
            away = unit[m] - cosine * x
            if away.norm() > 1e-14:
                step = step + share[m] * torch.arccos(cosine) * away / away.norm()
        if step.norm() < 1e-15:
            break
        x = torch.cos(step.norm()) * x + torch.sin(step.norm()) * step / step.norm()
    return x * length


def multi_slerp(weights, scaling, parameters, examples):
    merged = {}
    for w in weights:
        base, tau = f64(w)
        share = {m: a / sum(scaling.values()) for m, a in scaling.items()}
        merged[w.name] = base + spherical_mean({m: tau[m] for m in scaling}, share)
    return merged


def karcher(weights, scaling, parameters, examples):
    share = {m: a / sum(scaling.values()) for m, a in scaling.items()}
    return {w.name: spherical_mean({m: w.members[m].double() for m in scaling}, share) for w in weights}


def model_stock(weights, scaling, parameters, examples):
    merged = {}
    n, total = len(scaling), sum(scaling.values())
    for w in weights:
        base, tau = f64(w)
        rows = dict(zip(scaling, by(w, parameters["over"], *(tau[m] for m in scaling)), strict=True))
        (origin,) = by(w, parameters["over"], base)
        moved = torch.empty_like(origin)
        for i in range(len(origin)):
            pairs = [(rows[a][i], rows[b][i]) for a in scaling for b in scaling if a < b]
            c = sum(float(x @ y / (x.norm() * y.norm()).clamp(min=1e-99)) for x, y in pairs) / len(pairs)
            c = min(max(c, 0.0), 1.0)
            t = n * c / (1 + (n - 1) * c)
            moved[i] = origin[i] + t * sum(a / total * rows[m][i] for m, a in scaling.items())
        merged[w.name] = unturned(w, parameters["over"], moved)
    return merged


def mats(weights, scaling, parameters, examples):
    """Conjugate gradients from the plain mean on one weight at a time, its entries one long vector.

    With K-FAC in the range of the Grams: a preconditioner would else move what they do not see.
    """
    merged = {}
    for w in weights:
        base = w.base.double()
        mean = sum(w.members[m].double() for m in scaling) / len(scaling)
        result = {kind: stat(w, kind) for kind in ("fisher", "gram", "output_gram")}
        needed = {"identity": (), "fisher": ("fisher",), "gram": ("gram",), "kfac": ("gram", "output_gram")}
        if not all(result[kind] for kind in needed[parameters["subspace"]]):
            merged[w.name] = mean
            continue

        def operator(m, v, w=w, result=result):
            if parameters["subspace"] == "identity":
                return v
            if parameters["subspace"] == "fisher":
                return result["fisher"][m] * v
            v = v.T if w.transposed else v
            v = v @ result["gram"][m]
            if parameters["subspace"] == "kfac":
                v = result["output_gram"][m] @ v
            return v.T if w.transposed else v

        def apply(v, operator=operator):
            return sum(a * operator(m, v) for m, a in scaling.items())

        right = sum(a * operator(m, w.members[m].double() - base) for m, a in scaling.items())
        x = mean - base
        r = right - apply(x)
        scale = torch.ones_like(base)
        if parameters["preconditioner"] == "jacobi":
            units = torch.eye(base.numel(), dtype=torch.float64).reshape(-1, *base.shape)
            scale = 1 / torch.stack([(u * apply(u)).sum() for u in units]).reshape(base.shape)

        def near(v, w=w, result=result, scale=scale, needed=needed):
            if parameters["preconditioner"] != "kfac":
                return scale * v
            v = v.T if w.transposed else v
            for kind, total in (("gram", 1.0), ("output_gram", sum(scaling.values()))):
                if kind in needed[parameters["subspace"]]:
                    gram = sum(a / total * result[kind][m] for m, a in scaling.items())
                    damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
                    v = v @ torch.linalg.inv(damped) if kind == "gram" else torch.linalg.inv(damped) @ v
            return v.T if w.transposed else v

        sides = []
        if parameters["subspace"] == "kfac":
            for kind in ("output_gram", "gram"):
                together = sum(g / g.trace() for g in result[kind].values())
                sides.append(together @ torch.linalg.pinv(together, rtol=1e-6, hermitian=True))

        def project(v, w=w, sides=sides):
            if not sides:
                return v
            v = sides[0] @ (v.T if w.transposed else v) @ sides[1].T
            return v.T if w.transposed else v

        r = project(r)
        p = project(near(r))
        for _ in range(parameters["iterations"]):
            if r.norm() <= parameters["tolerance"] * right.norm():
                break
            ap = apply(p)
            old = (r * project(near(r))).sum()
            step = old / (p * ap).sum()
            x, r = x + step * p, project(r - step * ap)
            p = project(near(r)) + (r * project(near(r))).sum() / old * p
        merged[w.name] = base + x
    return merged


def svd(matrix, size=None):
    """Singular vectors and values as the papers have them; those that are rounding noise left out."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 1e-5 * (s[0] if size is None else size)).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def each_matrix(weights, scaling, step):
    """θ_0 + what `step` makes of a matrix's task vectors [out, in]; what is no matrix is the mean."""
    merged = {}
    for w in weights:
        base, tau = f64(w)
        if base.dim() != 2:
            merged[w.name] = base + sum(a * tau[m] for m, a in scaling.items()) / len(scaling)
            continue
        moved = step({m: tau[m].T if w.transposed else tau[m] for m in scaling})
        merged[w.name] = base + (moved.T if w.transposed else moved)
    return merged


def iso_c(weights, scaling, parameters, examples):
    def step(tau):
        total = sum(a * tau[m] for m, a in scaling.items())
        u, s, vh = svd(total)
        kept = round(parameters["rank"] * min(total.shape))
        return s[:kept].mean() * u[:, :kept] @ vh[:kept]

    return each_matrix(weights, scaling, step)


def tsv_m(weights, scaling, parameters, examples):
    def step(tau):
        parts = {m: svd(v) for m, v in tau.items()}
        rank = min(next(iter(tau.values())).shape)
        each = max(int(parameters["rank"] * rank / len(scaling)), 1)
        u = torch.cat([parts[m][0][:, :each] for m in scaling], dim=1)
        s = torch.cat([a * parts[m][1][:each] for m, a in scaling.items()])
        vh = torch.cat([parts[m][2][:each] for m in scaling], dim=0)
        (p, _, qh), (x, _, yh) = svd(u), svd(vh)
        return p @ qh @ torch.diag(s) @ x @ yh

    return each_matrix(weights, scaling, step)


def polar(matrix):
    u, _, vh = svd(matrix)
    return u @ vh


def iso_cts(weights, scaling, parameters, examples):
    def step(tau):
        moved = [a * tau[m] for m, a in scaling.items()]
        r = min(moved[0].shape)
        own = round((r - int(parameters["common"] * r)) / len(scaling))
        k = r - own * len(scaling)
        u, s, vh = svd(sum(moved))
        u, s, vh = u[:, :k], s[:k], vh[:k]
        parts = [svd(v - u @ u.T @ v, v.norm()) for v in moved]
        left = torch.cat([*(p[0][:, :own] for p in parts), u], dim=1)
        values = torch.cat([*(p[1][:own] for p in parts), s])
        right = torch.cat([*(p[2][:own] for p in parts), vh])
        return values.mean() * polar(left) @ polar(right)

    return each_matrix(weights, scaling, step)


def own_gram(tau):
    gram = tau.T @ tau
    return gram / gram.trace() if gram.trace() > 0 else gram


def ace(weights, scaling, parameters, examples):
    def step(tau):
        centred = {m: v - v.mean(0) for m, v in tau.items()}
        gram = {m: own_gram(v) for m, v in centred.items()}
        together = sum(gram.values())
        n = len(together)
        ridge = parameters["epsilon"] * torch.eye(n, dtype=torch.float64)
        column = torch.ones(n, 1, dtype=torch.float64)
        system = sum(g + ridge for g in gram.values()) + column @ (column.T @ together / n)
        moved = sum(a * centred[m] @ (gram[m] + ridge) for m, a in scaling.items()) @ torch.linalg.inv(system)
        if parameters["refine"]:
            rest = sum(a * tau[m] @ (gram[m] - together / len(scaling)) for m, a in scaling.items()) + moved
            u, s, vh = svd(rest)
            k = int(0.3 * min(rest.shape))
            moved = moved + s[:k].mean() * u[:, :k] @ vh[:k]
        return moved

    return each_matrix(weights, scaling, step)


def wudi(weights, scaling, parameters, examples):
    def step(tau):
        gram = {m: own_gram(v) for m, v in tau.items()}
        inverse = torch.linalg.pinv(sum(gram.values()), rtol=parameters["filter"], hermitian=True)
        return sum(a * tau[m] @ gram[m] for m, a in scaling.items()) @ inverse

    return each_matrix(weights, scaling, step)


def esm(weights, scaling, parameters, examples):
    steps, lengths = {}, {}
    for w in weights:
        _, tau = f64(w)
        grams = stat(w, "gram")
        if not grams:
            steps[w.name] = sum(a * tau[m] for m, a in scaling.items()) / len(scaling)
            continue
        tau = {m: tau[m].T if w.transposed else tau[m] for m in scaling}
        mean = sum(v.norm() for v in tau.values()) / len(tau)
        lefts, rights = [], []
        for m, a in scaling.items():
            values, vectors = torch.linalg.eigh(tau[m] @ grams[m] @ tau[m].T)
            values, vectors = values.flip(0), vectors.flip(1)
            k = min(len(values) // len(scaling), int((values > 1e-10 * values[0]).sum()))
            v = (values[:k] / values[:k].mean()) ** 0.15
            v = torch.diag(v / v.mean())
            lefts.append(vectors[:, :k] @ v)
            rights.append(a * v @ (vectors.T @ tau[m])[:k] * tau[m].norm() ** 2 / mean**2)
        left, right = torch.cat(lefts, dim=1), torch.cat(rights)
        columns = right.norm(dim=0)
        right = right * (columns / columns.mean()) ** 2
        step = 2 * svd(left)[1].mean() * svd(right)[1].mean() * polar(left) @ polar(right)
        steps[w.name] = step.T if w.transposed else step
        lengths[w.name] = sum(tau.values()).norm()
    if parameters["layers"]:
        for name, length in lengths.items():
            kind = [v for other, v in lengths.items() if other.split(".")[2:] == name.split(".")[2:]]
            steps[name] = steps[name] * (length / (sum(kind) / len(kind))) ** 2
    return {w.name: w.base.double() + steps[w.name] for w in weights}


def depth_scaled(inner):
    def run(weights, scaling, parameters, examples):
        plain = inner(weights, scaling, parameters, examples)
        merged = {}
        for w in weights:
            depth = 0.0 if w.name.startswith(("embeddings", "layer.0")) else 1.0  # the test pool has two layers
            scale = parameters["a"] + parameters["b"] * depth
            merged[w.name] = w.base.double() + scale * (plain[w.name] - w.base.double())
        return merged

    return run


def calibrated(inner, flat=False):
    def run(weights, scaling, parameters, examples):
        merged = inner(weights, scaling, parameters, examples)
        for w in weights:
            base, tau = f64(w)
            if base.dim() != 2:
                continue
            turned = (lambda v: v.T) if w.transposed else (lambda v: v)
            step = turned(merged[w.name] - base)
            u, _, _ = svd(step)
            if flat:  # any basis of its range is one of left singular vectors
                u, _, _ = svd(u @ u.T @ sum(a * turned(tau[m]) for m, a in scaling.items()))
            calibrated = torch.zeros_like(step)
            for direction in u.T:
                whole = direction @ step  # σ_r v_r
                own = [direction @ turned(tau[m]) for m in scaling]
                c = len(scaling) / sum(max(1.0, float(whole @ part / part.square().sum())) for part in own)
                calibrated += c * torch.outer(direction, whole)
            merged[w.name] = base + turned(calibrated)
        return merged

    return run


globals()["svc+task_arithmetic"] = calibrated(task_arithmetic)
globals()["svc+ties"] = calibrated(ties)
globals()["svc+lines+ties"] = calibrated(depth_scaled(ties))
globals()["lines+svc+iso_cts"] = depth_scaled(calibrated(iso_cts, flat=True))
