// A small DeepSeek-V3 in plain JavaScript, the twin of model.py: the same names in the same order, but it reads one
// token at a time, as a decoder does. It keeps what it saw (weights, routing) for the page, and leaves out what the
// page switches off. Papers: V2 = arXiv 2405.04434, V3 = arXiv 2412.19437; equation numbers are V3's.
// Letters in the shape comments, as in model.py, without B and T, which are 1:
//   C n_embd    H heads    V vocabulary    S positions in the cache
//   n qk_nope_head_dim, r qk_rope_head_dim, v v_head_dim, c kv_lora_rank: the head and latent sizes
//   E routed experts    K experts per token    h expert width    D MTP modules
'use strict';

// ---------- vectors: a Float32Array is a vector, or a matrix row after row

// x (n) times the n numbers of `a` that begin at `start`. Four sums, because each addition waits for the one before it
function dot(a, start, x) {
  let s0 = 0, s1 = 0, s2 = 0, s3 = 0, j = 0;
  for (; j + 3 < x.length; j += 4) {
    s0 += a[start + j] * x[j];
    s1 += a[start + j + 1] * x[j + 1];
    s2 += a[start + j + 2] * x[j + 2];
    s3 += a[start + j + 3] * x[j + 3];
  }
  for (; j < x.length; j++) s0 += a[start + j] * x[j];
  return s0 + s1 + s2 + s3;
}

// y (n) += scale * the n numbers of `a` that begin at `start`
function add_scaled(y, scale, a, start = 0) {
  for (let j = 0; j < y.length; j++) y[j] += scale * a[start + j];
  return y;
}

// weight (out, in), x (in) -> (out)
function multiply(weight, x) {
  const y = new Float32Array(weight.length / x.length);
  for (let i = 0; i < y.length; i++) y[i] = dot(weight, i * x.length, x);
  return y;
}

function softmax(x) {
  const most = x.reduce((a, b) => Math.max(a, b)), y = x.map(value => Math.exp(value - most));
  const total = y.reduce((a, b) => a + b);
  return y.map(value => value / total);
}

// -> the indices of the k largest numbers, the largest first; of equal ones the first
function topk(x, k) {
  const best = [];
  for (let i = 0; i < x.length; i++) {
    let place = best.length;
    while (place > 0 && x[i] > x[best[place - 1]]) place--;
    if (place < k) best.splice(place, 0, i);
    if (best.length > k) best.pop();
  }
  return best;
}

const range = (n, each) => Array.from({length: n}, (_, i) => each(i));

// ---------- the model. w(name): the weight of this name in model.py's state dict, below the part that is built

const under = (w, prefix) => name => w(`${prefix}.${name}`);
function Linear(w, name) {
  const weight = w(`${name}.weight`), bias = w(`${name}.bias`);
  return x => bias ? add_scaled(multiply(weight, x), 1, bias) : multiply(weight, x);
}

function RMSNorm(w, name, eps) {
  const weight = w(`${name}.weight`);
  return x => {
    const scale = 1 / Math.sqrt(dot(x, 0, x) / x.length + eps);
    return x.map((value, i) => value * scale * weight[i]);
  };
}

// Rotate the interleaved pairs (x0, x1), (x2, x3), ... x (r), cos and sin (r/2)
function apply_rope(x, cos, sin) {
  return x.map((value, i) => i % 2 === 0 ? value * cos[i >> 1] - x[i + 1] * sin[i >> 1]
                                         : x[i - 1] * sin[i >> 1] + value * cos[i >> 1]);
}

// Multi-head Latent Attention (V2 section 2.1, V3 eq. 1-11)
class MLA {
  off = {heads: [], rope: false};

  constructor(config, w) {
    const {qk_nope_head_dim: n, qk_rope_head_dim: r, kv_lora_rank: c, v_head_dim: v} = config;
    this.sizes = {H: config.n_head, n, r, c, v};
    this.scale = (n + r) ** -0.5 * yarn_mscale(config.rope_factor, config.rope_mscale_all_dim) ** 2;
    const compressed = [Linear(w, 'q_a_proj'), RMSNorm(w, 'q_a_layernorm', 1e-6), Linear(w, 'q_b_proj')];
    this.q_steps = config.q_lora_rank > 0 ? compressed : [Linear(w, 'q_proj')];        // eq. 6, 7
    this.kv_a_proj_with_mqa = Linear(w, 'kv_a_proj_with_mqa');
    this.kv_a_layernorm = RMSNorm(w, 'kv_a_layernorm', 1e-6);
    this.kv_b_proj = w('kv_b_proj.weight');                                            // (H, n + v, c)
    this.o_proj = Linear(w, 'o_proj');
  }

  // x (C) at position pos -> (C). cache (S_max, c + r) gets a row
  forward(x, cos, sin, cache, pos) {
    const {q, latent} = this.project(x, cos, sin);
    cache.set(latent, pos * latent.length);
    return this.o_proj(this.attend_absorbed(q, cache, pos + 1));                       // eq. 11
  }

  // x (C) -> q (H, n + r), and what the cache holds: the normed latent and the rotated key of all heads (c + r)
  project(x, cos, sin) {
    const {H, n, r, c} = this.sizes, q = this.q_steps.reduce((y, step) => step(y), x);
    for (let h = 0; h < H; h++) {
      const q_rope = q.subarray(h * (n + r) + n, (h + 1) * (n + r));
      q_rope.set(apply_rope(q_rope, cos, sin));                                        // eq. 8
    }
    const latent = this.kv_a_proj_with_mqa(x);                                         // eq. 1, 3
    const c_kv = latent.subarray(0, c), k_rope = latent.subarray(c);
    c_kv.set(this.kv_a_layernorm(c_kv));
    k_rope.set(apply_rope(k_rope, cos, sin));
    return {q, latent};
  }

  // q (H, n + r) attends to the first S rows of the cache -> (H * v). No key and no value of a head ever exists: W_uk
  // goes into the query, W_uv into the output (V2 section 2.1.2). All heads share a key, the cache's row.
  attend_absorbed(q, cache, S) {
    const {H, n, r, c, v} = this.sizes, w = this.kv_b_proj, y = new Float32Array(H * v);
    this.weights = range(H, h => {
      const w_uk = h * (n + v) * c, w_uv = w_uk + n * c;                               // where they begin in w
      const query = new Float32Array(c + r), absorbed = query.subarray(0, c);
      for (let i = 0; i < n; i++) add_scaled(absorbed, q[h * (n + r) + i], w, w_uk + i * c);
      if (!this.off.rope) query.set(q.subarray(h * (n + r) + n, (h + 1) * (n + r)), c);
      const scores = new Float32Array(S);
      for (let s = 0; s < S; s++) scores[s] = this.scale * dot(cache, s * (c + r), query);
      const weights = softmax(scores), mixed = new Float32Array(c);                    // eq. 10
      for (let s = 0; s < S; s++) add_scaled(mixed, weights[s], cache, s * (c + r));
      for (let i = 0; i < v && !this.off.heads.includes(h); i++) y[h * v + i] = dot(w, w_uv + i * c, mixed);
      return weights;                                                                  // (S)
    });
    return y;
  }
}

// [gate, up] (2h) -> silu(gate) * up (h)
function swiglu(x) {
  const h = x.length / 2;
  return x.subarray(0, h).map((gate, i) => gate / (1 + Math.exp(-gate)) * x[h + i]);
}

// An expert, the dense FFN, or all shared experts together as one wide FFN
const MLP = (gate_up, down) => x => multiply(down, swiglu(multiply(gate_up, x)));
const dense_mlp = w => MLP(w('gate_up_proj.weight'), w('down_proj.weight'));

const score_fns = {sigmoid: x => x.map(value => 1 / (1 + Math.exp(-value))), softmax};

// DeepSeekMoE (V3 eq. 12-16): shared experts for every token, and K of E small routed experts per token
class MoE {
  off = {experts: [], shared: false};

  constructor(config, w) {
    const {n_routed_experts: E, n_shared_experts} = config;
    const part = (all, e) => all.subarray(e * all.length / E, (e + 1) * all.length / E);
    this.config = config;
    this.gate = Linear(w, 'gate');                                                     // the router
    this.b = w('e_score_correction_bias');                                             // of eq. 16
    this.experts = range(E, e => MLP(part(w('experts_gate_up'), e), part(w('experts_down'), e)));
    this.shared_experts = n_shared_experts > 0 && dense_mlp(under(w, 'shared_experts'));
  }

  // (C) -> (C)
  forward(x) {
    this.routing = this.route(x);
    const {gates, experts} = this.routing, shared = this.off.shared ? null : this.shared_experts;
    const out = shared ? shared(x) : new Float32Array(x.length);
    experts.forEach((e, k) => add_scaled(out, gates[k], this.experts[e](x)));          // eq. 12
    return out;
  }

  // x (C) -> scores (E), gates (K), chosen experts (K)
  route(x) {
    const {num_experts_per_tok: K, n_group, norm_topk_prob, routed_scaling_factor, scoring_func} = this.config;
    const scores = score_fns[scoring_func](this.gate(x));                              // eq. 15
    let biased = scores.map((s, e) => s + this.b[e]);
    for (const e of this.off.experts) [scores[e], biased[e]] = [0, -Infinity];         // another takes its place
    if (n_group > 1) biased = keep_best_groups(biased, this.config);
    const experts = topk(biased, K);                                                   // eq. 16
    let gates = experts.map(e => scores[e]);                                           // without b
    if (norm_topk_prob && K > 1) {
      const total = gates.reduce((a, b) => a + b, 1e-20);
      gates = gates.map(g => g / total);                                               // eq. 13
    }
    return {scores, gates: gates.map(g => g * routed_scaling_factor), experts};
  }
}

class Block {
  constructor(config, w, layer) {
    const dense = config.n_routed_experts === 0 || layer < config.first_k_dense_replace;
    this.input_layernorm = RMSNorm(w, 'input_layernorm', config.rms_norm_eps);
    this.attn = new MLA(config, under(w, 'attn'));
    this.post_attention_layernorm = RMSNorm(w, 'post_attention_layernorm', config.rms_norm_eps);
    this.mlp = dense ? {forward: dense_mlp(under(w, 'mlp'))} : new MoE(config, under(w, 'mlp'));
  }

  // (C) -> (C)
  forward(x, cos, sin, cache, pos) {
    x = add_scaled(this.attn.forward(this.input_layernorm(x), cos, sin, cache, pos), 1, x);
    return add_scaled(this.mlp.forward(this.post_attention_layernorm(x)), 1, x);
  }
}

// Multi-token prediction module k (V3 section 2.2): h_{k-1} and token t_{i+k} -> a state that predicts t_{i+k+1}
class MTP {
  constructor(config, w) {
    this.enorm = RMSNorm(w, 'enorm', config.rms_norm_eps);
    this.hnorm = RMSNorm(w, 'hnorm', config.rms_norm_eps);
    this.eh_proj = Linear(w, 'eh_proj');
    this.h = range(config.mtp_n_layer, i => new Block(config, under(w, `h.${i}`), config.n_layer + i));
    this.norm = RMSNorm(w, 'norm', config.rms_norm_eps);
  }

  // eq. 21, in the released order: the embedding first
  combine(emb, h) {
    return this.eh_proj(Float32Array.of(...this.enorm(emb), ...this.hnorm(h)));        // (2C) -> (C)
  }
}

class GPT {
  constructor(config, weights) {
    const w = name => weights[name];
    this.config = config;
    this.lm_head = Linear(w, 'lm_head');
    const wte = w('transformer.wte.weight') || w('lm_head.weight'), C = config.n_embd;  // (V, C): often one matrix
    this.emb = token => wte.slice(token * C, (token + 1) * C);
    this.h = range(config.n_layer, i => new Block(config, under(w, `transformer.h.${i}`), i));
    this.ln_f = RMSNorm(w, 'transformer.ln_f', config.rms_norm_eps);
    this.mtp = range(config.num_nextn_predict_layers, k => new MTP(config, under(w, `mtp.${k}`)));
    this.rope_table = rope_table(config);
  }

  run_blocks(blocks, x, caches, pos) {
    const [cos, sin] = this.rope_table(pos);
    blocks.forEach((block, i) => { x = block.forward(x, cos, sin, caches[i], pos); });
    return x;
  }

  // a token at position pos -> the state after the final norm (C)
  main_stack(token, caches, pos) {
    return this.ln_f(this.run_blocks(this.h, this.emb(token), caches, pos));
  }

  // eq. 21-22: token t_{i+k}, h_{k-1} (C) at position i -> h_k (C)
  mtp_module(module, token, h, caches, pos) {
    return module.norm(this.run_blocks(module.h, module.combine(this.emb(token), h), caches, pos));
  }
}

const yarn_mscale = (factor, mscale) => factor > 1 ? 0.1 * mscale * Math.log(factor) + 1 : 1;

// A function of a position: cos and sin of position * theta^(-2i/r), (r/2) each. YaRN (arXiv 2309.00071, section 3.2)
// keeps the frequency of pairs that turn often in the trained context, divides others by the factor, blends between.
function rope_table(config) {
  const {qk_rope_head_dim: r, rope_factor: factor, rope_theta: theta, rope_mscale, rope_mscale_all_dim} = config;
  const trained = config.rope_original_max_position_embeddings;
  const pair = turns => r * Math.log(trained / (turns * 2 * Math.PI)) / (2 * Math.log(theta));  // with these turns
  const low = Math.max(Math.floor(pair(config.rope_beta_fast)), 0);
  const high = Math.min(Math.ceil(pair(config.rope_beta_slow)), r - 1);
  const freq = range(r / 2, i => {
    const plain = theta ** (-2 * i / r), slowed = Math.min(1, Math.max(0, (i - low) / (high - low || 0.001)));
    return factor > 1 ? plain * (1 - slowed) + plain / factor * slowed : plain;
  });
  const scale = rope_mscale > 0 && rope_mscale_all_dim > 0 ?
    yarn_mscale(factor, rope_mscale) / yarn_mscale(factor, rope_mscale_all_dim) : yarn_mscale(factor, 1);
  return pos => [Math.cos, Math.sin].map(wave => Float32Array.from(freq, f => wave(pos * f) * scale));
}

// Group-limited routing (V3 section 2.1.2): choice (E), with -Infinity outside the topk_group best groups
function keep_best_groups(choice, {n_group, topk_group, scoring_func}) {
  const size = choice.length / n_group, best = Math.min(scoring_func === 'sigmoid' ? 2 : 1, size);
  const strength = range(n_group, g => {
    const group = choice.subarray(g * size, (g + 1) * size);
    return topk(group, best).reduce((sum, e) => sum + group[e], 0);
  });
  const kept = topk(strength, topk_group);
  return choice.map((value, e) => kept.includes(Math.floor(e / size)) ? value : -Infinity);
}

// ---------- decoding

const GREEDY = 1e-6;  // below this temperature the likeliest token is taken

// logits (V) -> (V). top_k 0: every token
function probabilities(logits, temperature, top_k) {
  const kept = topk(logits, temperature < GREEDY ? 1 : Math.min(top_k, logits.length));
  if (temperature < GREEDY) return logits.map((z, i) => i === kept[0] ? 1 : 0);
  const least = top_k > 0 ? logits[kept.pop()] : -Infinity;
  return softmax(logits.map(z => z < least ? -Infinity : z / temperature));
}

// probs (V) -> a token: the smallest exponential time wins
function draw(probs, random) {
  return topk(probs.map(p => p / -Math.log(random())), 1)[0];
}

// seed -> a function whose calls give numbers in (0, 1): a counter with its bits mixed. Equal seeds, equal numbers
function generator(seed) {
  return () => {
    seed = seed + 0x9e3779b9 | 0;
    let bits = Math.imul(seed ^ seed >>> 16, 0x21f0aaad);
    bits = Math.imul(bits ^ bits >>> 15, 0x735a2d97);
    return ((bits ^ bits >>> 15) >>> 0) / 2 ** 32 + 2 ** -33;
  };
}

// One text that grows: its tokens, the caches, and h[k][i], the states of the main stack (k = 0) and of module k
class Reader {
  constructor(model, length) {
    const width = model.config.kv_lora_rank + model.config.qk_rope_head_dim;  // (length, c + r) for a block: no more
    this.model = model;
    this.tokens = [];
    this.caches = [model, ...model.mtp].map(({h}) => h.map(() => new Float32Array(length * width)));
    this.h = this.caches.map(() => []);
  }

  // t_pos -> the logits (V) of t_{pos+1}, and the drafts, which are made without the main stack's look at t_pos
  read(token) {
    const pos = this.tokens.push(token) - 1, drafts = pos > 0 ? this.draft(pos) : [];
    this.h[0][pos] = this.model.main_stack(token, this.caches[0], pos);
    return {drafts, logits: this.model.lm_head(this.h[0][pos])};
  }

  // V3 section 5.4.3: module k drafts t_{pos+k}. Of its k rows the first is final, the others hold drafts for tokens
  draft(pos) {
    const tokens = [...this.tokens];
    return this.model.mtp.map((module, number) => {
      const k = number + 1;
      for (let i = Math.max(0, pos - k); i < pos; i++)
        this.h[k][i] = this.model.mtp_module(module, tokens[i + k], this.h[k - 1][i], this.caches[k], i);
      const p = softmax(this.model.lm_head(this.h[k][pos - 1])), [token] = topk(p, 1);
      tokens.push(token);
      return {token, p: p[token]};
    });
  }
}

// Read the prompt and go on with it, up to `length` tokens or the stop token. Yields what the page shows of a token
function* write(model, {prompt, length, stop, seed, temperature, top_k}) {
  const reader = new Reader(model, length), random = generator(seed);
  let next, p;
  for (let pos = 0; pos < length; pos++) {
    const token = pos < prompt.length ? prompt[pos] : next, came = p && p[token];
    const {drafts, logits} = reader.read(token), q = probabilities(logits, temperature, top_k);
    p = softmax(logits);
    next = draw(q, random);
    const layers = model.h.map(({attn, mlp}) => ({weights: attn.weights, ...mlp.routing}));
    yield {token, came, drafts, layers, next: topk(p, 5).map(id => ({id, p: p[id], q: q[id]}))};
    if (token === stop && pos >= prompt.length) return;
  }
}

// ---------- the worker

// The bytes of the page -> {name: Float32Array}. kinds: float32, float16, and int8, which a scale for each row precedes
function unpack(parts, base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  const half = Float32Array.from(range(65536, bits => {
    const exponent = bits >> 10 & 31, fraction = (bits & 1023) / 1024;
    return (bits >> 15 ? -1 : 1) * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
  }));
  const read = {
    float32: ({start, size}) => new Float32Array(bytes.buffer, start, size),
    float16: ({start, size}) => Float32Array.from(new Uint16Array(bytes.buffer, start, size), bits => half[bits]),
    int8: ({start, size, rows}) => {
      const scale = new Float32Array(bytes.buffer, start, rows), width = size / rows;
      return Float32Array.from(new Int8Array(bytes.buffer, start + 4 * rows, size), (x, i) => x * scale[i / width | 0]);
    },
  };
  return Object.fromEntries(parts.map(part => [part.name, read[part.kind](part)]));
}

// The page sends the weights once, then a run or a stop; each message ends the run before it. A run's records go back
// in bundles, one for each 25 ms
function serve() {
  let model, newest;
  onmessage = async ({data}) => {
    newest = data;
    if (data.weights) model = new GPT(data.config, unpack(data.parts, data.weights));
    if (!data.run) return;
    model.h.forEach(({attn, mlp}, layer) => { attn.off = mlp.off = data.off[layer]; });
    model.config.num_experts_per_tok = data.experts;
    let records = [], began = performance.now(), read = 0;
    for (const record of write(model, data)) {
      records.push(record);
      const milliseconds = performance.now() - began, pause = ++read > data.prompt.length ? data.pause : 0;
      if (milliseconds < 25 && !pause) continue;
      postMessage({run: data.run, records, milliseconds});
      await new Promise(later => setTimeout(later, pause));
      if (newest !== data) return;
      [records, began] = [[], performance.now()];
    }
    postMessage({run: data.run, records, milliseconds: performance.now() - began, done: true});
  };
}

if (typeof WorkerGlobalScope !== 'undefined') serve();
