// The openai package for Node against a service: `node with_openai.mjs URL`. Prints what it got as JSON.
import { createRequire } from 'node:module';
const require = createRequire(process.env.CLIENTS + '/');
const OpenAI = require('openai').default ?? require('openai');

const client = new OpenAI({ baseURL: process.argv[2] + '/v1', apiKey: 'none', maxRetries: 0 });
const asked = { model: 'demo', prompt: 'words: 2009\n', max_tokens: 32 };
const chat = { model: 'demo', messages: [{ role: 'user', content: 'words: 2009' }] };

const whole = await client.completions.create(asked);
let streamed = '';
for await (const part of await client.completions.create({ ...asked, stream: true })) streamed += part.choices[0].text;
let said = '';
for await (const part of await client.chat.completions.create({ ...chat, stream: true })) {
  said += part.choices[0].delta.content ?? '';
}
const refused = await client.completions.create({ ...asked, temperature: -1 }).catch((error) => error);
console.log(JSON.stringify({
  whole: whole.choices[0].text,
  tokens: whole.usage.completion_tokens,
  streamed,
  models: (await client.models.list()).data.map((model) => model.id),
  chat: (await client.chat.completions.create(chat)).choices[0].message.content,
  'chat streamed': said,
  refused: [refused.constructor.name, refused.status, refused.param],
}));
