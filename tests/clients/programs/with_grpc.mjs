// A client for Node made from our .proto alone: `node with_grpc.mjs ADDRESS PROTO`. Prints what it got as JSON.
import { createRequire } from 'node:module';
const require = createRequire(process.env.CLIENTS + '/');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const definition = loader.loadSync(process.argv[3], { longs: Number, enums: String, oneofs: true, defaults: true });
const { GenerationService } = grpc.loadPackageDefinition(definition).twotower.v1;
const client = new GenerationService(process.argv[2], grpc.credentials.createInsecure());
const unary = (method, request) =>
  new Promise((resolve) => client[method](request, (error, answer) => resolve(error ?? answer)));
const asked = { text: 'words: 2009\n', params: { maxNewTokens: 32 } };

const whole = await unary('Generate', asked);
let streamed = '';
let finished;
for await (const event of client.GenerateStream(asked)) {
  if (event.event === 'block') streamed += event.block.text;
  if (event.event === 'finished') finished = event.finished.finishReason;
}
const scored = await unary('Score', { promptText: 'words: 2009\n', continuationText: 'two thousand and nine' });
const refused = await unary('Generate', { ...asked, params: { temperature: -1 } });
console.log(JSON.stringify({
  whole: whole.text,
  streamed,
  finished,
  scored: scored.sumLogProb,
  modes: (await unary('GetModelInfo', {})).modes,
  refused: [refused.code, refused.details],
}));
client.close();
