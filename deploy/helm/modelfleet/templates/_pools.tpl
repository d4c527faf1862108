{{/* A pool: the defaults with what the pool says. Structured keys are merged, free ones replaced. Takes root, name. */}}
{{- define "modelfleet.pool" -}}
{{- $pool := deepCopy .root.Values.inference.poolDefaults -}}
{{- $structured := list "gpu" "image" "shm" "cache" "batch" "memory" "startup" "rollout" "autoscaling" "podDisruptionBudget" -}}
{{- range $key, $value := default dict (index .root.Values.inference.pools .name) -}}
{{- if has $key $structured -}}
{{- $block := get $pool $key -}}
{{- range $inner, $given := $value -}}{{- $_ := set $block $inner $given -}}{{- end -}}
{{- else -}}
{{- $_ := set $pool $key $value -}}
{{- end -}}
{{- end -}}
{{ toYaml $pool }}
{{- end -}}

{{/* The volume of a pool's cache. */}}
{{- define "modelfleet.cacheVolume" -}}
{{- if eq .kind "emptyDir" }}
- name: cache
  emptyDir: {sizeLimit: {{ .size }}}
{{- else if eq .kind "ephemeral" }}
- name: cache
  ephemeral:
    volumeClaimTemplate:
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .storageClassName }}
        storageClassName: {{ . }}
        {{- end }}
        resources: {requests: {storage: {{ .size }}}}
{{- else if eq .kind "persistentVolumeClaim" }}
- name: cache
  persistentVolumeClaim: {claimName: {{ .existingClaim }}}
{{- else }}
- name: cache
  hostPath: {path: {{ .hostPath }}, type: DirectoryOrCreate}
{{- end }}
{{- end -}}
