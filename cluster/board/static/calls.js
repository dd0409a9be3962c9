// A request of the playground: its body, and the same as a command to copy. Knows nothing of the page.
const GRPC_PORT = 50051; // by default; a page cannot know another
const KEY = "TWOTOWER_API_KEY"; // the variable that our own commands have it from, too

function keysWanted() { return document.body.dataset.keys === "true"; }

function bodyOf(mode, asked) {
  const diffusion = { mode };
  if (mode === "diffusion") diffusion.confidence_threshold = asked.gamma;
  if (mode !== "ar") diffusion.trace = true;
  return { prompt: asked.prompt, max_tokens: asked.most, stream: true, stream_options: { include_usage: true }, diffusion };
}

function quoted(text) { return `'${text.replaceAll("'", "'\\''")}'`; }

function asCurl(mode, asked, base) {
  const key = keysWanted() ? ` -H "authorization: Bearer $${KEY}"` : "";
  return `curl -sN ${base}/v1/completions${key} -d ${quoted(JSON.stringify(bodyOf(mode, asked)))}`;
}

function asGrpcurl(mode, asked, base) {
  const params = { mode: `MODE_${mode.toUpperCase()}`, maxNewTokens: asked.most };
  if (mode === "diffusion") params.confidenceThreshold = asked.gamma;
  const message = { text: asked.prompt, params, ...(mode === "ar" ? {} : { trace: true }) };
  const key = keysWanted() ? ` -H "authorization: Bearer $${KEY}"` : "";
  const plain = base.startsWith("https:") ? "" : " -plaintext"; // both faces speak TLS, or neither
  return `grpcurl${plain}${key} -d ${quoted(JSON.stringify(message))} ${new URL(base).hostname}:${GRPC_PORT} twotower.v1.GenerationService/GenerateStream`;
}

function pythonOf(value) {
  if (value === true) return "True";
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, inner]) => `${JSON.stringify(name)}: ${pythonOf(inner)}`).join(", ")}}`;
}

function asPython(mode, asked, base) {
  const key = keysWanted() ? `, {"authorization": "Bearer " + os.environ["${KEY}"]}` : "";
  return `import json
${keysWanted() ? "import os\n" : ""}import urllib.request

body = ${pythonOf(bodyOf(mode, asked))}
request = urllib.request.Request("${base}/v1/completions", json.dumps(body).encode()${key})
with urllib.request.urlopen(request) as events:
    for line in events:
        if line.startswith(b"data: {"):
            print(json.loads(line[6:]))`;
}

const CALLS = { curl: asCurl, Python: asPython, grpcurl: asGrpcurl };
