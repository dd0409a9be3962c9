{{/* What pods have in common. Each takes (dict "root" $ "component" "head" | "router" | "cell"). */}}

{{/* Without a version: another label is another Ray cluster. */}}
{{- define "twotower.pod.labels" -}}
{{ include "twotower.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Pod Security `restricted`. No fsGroup: a volume of weights would be walked through at every start. */}}
{{- define "twotower.pod.security" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  runAsGroup: 1000
  seccompProfile: {type: RuntimeDefault}
automountServiceAccountToken: {{ eq .component "head" }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* KubeRay gives its own init container the same. */}}
{{- define "twotower.container.security" -}}
securityContext:
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
{{- end -}}

{{- define "twotower.container.image" -}}
image: {{ include "twotower.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- end -}}

{{- define "twotower.container.environment" -}}
env:
  - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  # Even when disabled, the dashboard posts once; to nobody.
  - {name: RAY_USAGE_STATS_REPORT_URL, value: "http://127.0.0.1:9/"}
  # A hung cell must give its GPUs back.
  - {name: RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS, value: "1"}
  # Replicas run our code on their own loop: docs/adr/0007.
  - {name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0"}
  # After SIGTERM a node drains this long at most.
  - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ include (eq .component "head" | ternary "twotower.drain.head" "twotower.drain.worker") .root | quote }}}
  # The longest prompt between router and cell: cluster/message_size.py. Every process needs the same.
  - {name: RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH, value: "67108864"}
  # What Serve's proxy answers by itself, in our words.
  - {name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: "cluster.faces.http.proxy_answers:middlewares"}
  - {name: TOKENIZERS_PARALLELISM, value: "false"}
  {{- with .root.Values.environment }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* A command that succeeds while this pod's Ray is well and some cell answers; of a router also that it listens. */}}
{{- define "twotower.container.probe" -}}
{{- $ingress := .root.Values.settings.ingress -}}
readinessProbe:
  exec:
    command:
      - bash
      - -c
      - >-
        wget --no-proxy -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success
        && wget --no-proxy {{ with .root.Values.tls.secretName }}--no-check-certificate {{ end }}-T 2 -q -O- http{{ with .root.Values.tls.secretName }}s{{ end }}://localhost:{{ int $ingress.http_port }}/ready
        {{- if eq .component "router" }}
        && timeout 2 bash -c '</dev/tcp/127.0.0.1/{{ int $ingress.grpc_port }}'
        {{- end }}
  initialDelaySeconds: 10
  periodSeconds: 5
  timeoutSeconds: 8
  failureThreshold: 2
{{- end -}}

{{/* Each file of a Secret of its own: a directory, which Kubernetes exchanges whole when the Secret changes. Nothing where
there is none. The list of mounts, then that of volumes. */}}
{{- define "twotower.tls.mounts" -}}
{{- if .root.Values.tls.secretName -}}
- {name: tls, mountPath: {{ include "twotower.tls.directory" . }}, readOnly: true}
{{- if and .root.Values.tls.grpcClientCa (eq .component "router") }}
- {name: client-ca, mountPath: {{ include "twotower.clientCa.directory" . }}, readOnly: true}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "twotower.tls.volumes" -}}
{{- with .root.Values.tls.secretName -}}
- name: tls
  secret: {secretName: {{ . }}}
{{- with $.root.Values.tls.grpcClientCa }}
{{- if eq $.component "router" }}
- name: client-ca
  secret: {secretName: {{ .secretName }}, items: [{key: {{ .key }}, path: {{ .key }}}]}
{{- end }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "twotower.weights.mount" -}}
- {name: checkpoint, mountPath: {{ .Values.weights.mountPath }}, readOnly: true}
{{- end -}}

{{/* Nothing where there is none. */}}
{{- define "twotower.weights.volume" -}}
{{- with .Values.weights -}}
{{- if .volume -}}
- name: checkpoint
  {{- toYaml .volume | nindent 2 }}
{{- else if .claim -}}
- name: checkpoint
  persistentVolumeClaim: {claimName: {{ .claim }}, readOnly: {{ not .init }}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "twotower.weights.init" -}}
{{- with .Values.weights.init -}}
initContainers:
  - name: weights
    {{- toYaml . | nindent 4 }}
    {{- include "twotower.container.security" $ | nindent 4 }}
    volumeMounts:
      - {name: checkpoint, mountPath: {{ $.Values.weights.mountPath }}}
{{- end -}}
{{- end -}}
